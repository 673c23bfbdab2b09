package rpcjson

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/slotota/ota"
)

// addMethods registers the built-in methods. RPC.List shows them in reverse.
func (s *Server) addMethods() {
	for _, m := range []method{
		{"RPC.List", "", Read, s.rpcList},
		{"RPC.Describe", "{name: %T}", Read, s.rpcDescribe},
		{"RPC.Ping", "", Read, s.rpcPing},
		{"Sys.Reboot", "{abort: %B, delay_ms: %d}", Operate, s.sysReboot},
		{"Sys.GetInfo", "", Read, s.sysGetInfo},
		{"OTA.Update", "{file: %Q, url: %Q, timeout: %d, commit_timeout: %d, ignore_same_version: %B}", Install, s.otaUpdate},
		{"OTA.Commit", "", Operate, s.otaCommit},
		{"OTA.Revert", "", Operate, s.otaRevert},
		{"OTA.CreateSnapshot", "{set_as_revert: %B, commit_timeout: %d}", Install, s.otaCreateSnapshot},
		{"OTA.Begin", "{timeout: %d, commit_timeout: %d, size: %d}", Install, s.otaBegin},
		{"OTA.Write", "{offset: %ld, data: %V}", Install, s.otaWrite},
		{"OTA.End", "", Install, s.otaEnd},
		{"OTA.Status", "", Read, s.otaStatus},
		{"OTA.GetBootState", "", Read, s.otaGetBootState},
		{"OTA.SetBootState", "{active_slot: %d, is_committed: %B, revert_slot: %d, commit_timeout: %d}", Install, s.otaSetBootState},
		{"Sys.GetUID", "", Read, s.sysGetUID},
	} {
		s.methods = append([]*method{&m}, s.methods...)
	}
}

func (s *Server) rpcList(context.Context, *Request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := make([]string, len(s.methods))
	for i, m := range s.methods {
		names[i] = m.name
	}
	return names, nil
}

func (s *Server) rpcDescribe(_ context.Context, r *Request) (any, error) {
	name, given := r.Args.String("name")
	switch {
	case r.Args.Err() != nil:
		return nil, r.Args.Err()
	case !given:
		return nil, errorf(400, "name is required")
	}
	m := s.method(name)
	if m == nil {
		return nil, errorf(404, "name not found")
	}
	return object("name", m.name, "args_fmt", m.args), nil
}

func (s *Server) rpcPing(_ context.Context, r *Request) (any, error) {
	return object("channel_info", r.Peer.Addr), nil
}

func (s *Server) sysGetInfo(context.Context, *Request) (any, error) {
	i := &s.o.Info
	u := Usage{Uptime: time.Since(s.start)}
	if i.Usage != nil {
		u = i.Usage()
	}
	return object("id", s.o.ID, "app", i.App, "fw_version", i.Version, "fw_id", i.BuildID,
		"mg_version", i.OSVersion, "mg_id", i.OSBuildID, "mac", i.MAC, "arch", i.Platform,
		"uptime", int64(u.Uptime/time.Second), "public_key", i.PublicKey,
		"ram_size", u.RAMSize, "ram_free", u.RAMFree, "ram_min_free", u.RAMMinFree,
		"fs_size", u.FSSize, "fs_free", u.FSFree), nil
}

func (s *Server) sysGetUID(context.Context, *Request) (any, error) {
	return object("pid", s.o.Info.ProductID, "app", s.o.Info.App, "uid", s.o.Info.UID), nil
}

func (s *Server) sysReboot(_ context.Context, r *Request) (any, error) {
	abort, _ := r.Args.Bool("abort")
	ms, given := r.Args.Int("delay_ms", math.MinInt64, math.MaxInt64)
	switch {
	case r.Args.Err() != nil:
		return nil, r.Args.Err()
	case ms < 0 || ms > maxDelay.Milliseconds():
		return nil, errorf(400, "invalid delay value")
	case abort:
		return nil, errorf(400, "abort is not supported")
	}
	delay := rebootDelay
	if given {
		delay = time.Duration(ms) * time.Millisecond
	}
	r.after = func() { s.rebootIn(delay) }
	return nil, nil
}

func (s *Server) otaCommit(ctx context.Context, r *Request) (any, error) {
	// Not among the arguments of the original.
	trial, given := r.Args.String("trial")
	var id ota.TrialID
	if given {
		var err error
		if id, err = ota.ParseTrialID(trial); err != nil {
			return nil, errorf(400, "trial: need 16 hexadecimal digits, got %s", ota.Quote(trial))
		}
	}
	if err := r.Args.Err(); err != nil {
		return nil, err
	}
	err := s.run(ctx, func(ctx context.Context) error {
		if given {
			return s.d.CommitTrial(ctx, id)
		}
		return s.d.Commit(ctx)
	})
	return nil, decided(err)
}

func (s *Server) otaRevert(ctx context.Context, r *Request) (any, error) {
	reboot := false // not for a trial that was called off before it began
	err := s.run(ctx, func(ctx context.Context) error {
		err := s.d.Revert(ctx)
		if reboot = err == nil && s.d.Status().RebootPending; reboot {
			s.rebootIn(rebootAnyway)
		}
		return err
	})
	if err == nil && reboot { // err tells whether reboot is set
		r.after = func() { s.rebootSooner(revertDelay) }
	}
	return nil, decided(err)
}

// decided returns what is answered for the error of a commit or revert: when
// there is nothing to decide, the original sends no message.
func decided(err error) error {
	if errors.Is(err, ota.ErrCommitted) {
		return &Error{Code: -1}
	}
	return failed(-1, "", err)
}

// failed returns what is answered for err, nil if that is nil: an *Error of the
// given code and text.
func failed(code int, text string, err error) error {
	if err == nil {
		return nil
	}
	e := errorf(code, "%s", message(err))
	if text != "" {
		e.Message = text + ": " + e.Message
	}
	e.Reason = reasonOf(err)
	return e
}

func (s *Server) otaCreateSnapshot(ctx context.Context, r *Request) (any, error) {
	var o ota.SnapshotOptions
	o.SetAsRevert, _ = r.Args.Bool("set_as_revert")
	o.CommitTimeout = s.o.CommitTimeout
	// Negative values mean the default in the original.
	if secs, given := r.Args.Int("commit_timeout", math.MinInt32, maxCommitSecs); given && secs >= 0 {
		o.CommitTimeout = time.Duration(secs) * time.Second
	}
	if err := r.Args.Err(); err != nil {
		return nil, err
	}
	var slot ota.SlotID
	err := s.run(ctx, func(ctx context.Context) (err error) {
		slot, err = s.d.CreateSnapshot(ctx, &o)
		return err
	})
	switch {
	case err == nil:
		return object("slot", int64(slot)), nil
	case errors.Is(err, ota.ErrNotCommitted):
		return nil, &Error{Code: -1, Message: "Cannot create snapshots in uncommitted state", Reason: reasonOf(err)}
	case errors.Is(err, ota.ErrNoBootState), errors.Is(err, ota.ErrBadBootState):
		return nil, failed(-2, "Failed to get boot state", err)
	case errors.Is(err, ota.ErrStateUnknown):
		return nil, failed(-3, "Failed to set boot state", err)
	}
	return nil, failed(-1, "Failed to create snapshot", err)
}

func (s *Server) otaGetBootState(ctx context.Context, _ *Request) (any, error) {
	b, err := s.d.BootState(ctx)
	if err != nil {
		return nil, failed(-1, "Failed to get boot state", err)
	}
	return object("active_slot", int64(b.Active), "is_committed", b.Committed, "revert_slot", int64(b.Revert),
		"commit_timeout", int64(b.CommitTimeout/time.Second)), nil
}

func (s *Server) otaSetBootState(ctx context.Context, r *Request) (any, error) {
	var p ota.BootStatePatch
	changes := false
	slot := func(name string) *ota.SlotID {
		v, given := r.Args.Int(name, math.MinInt32, math.MaxInt32)
		if !given {
			return nil
		}
		changes = true
		id := ota.SlotID(v)
		return &id
	}
	p.Active = slot("active_slot")
	p.Revert = slot("revert_slot")
	if v, given := r.Args.Bool("is_committed"); given {
		p.Committed = &v
		changes = true
	}
	if v, given := r.Args.Int("commit_timeout", 0, maxCommitSecs); given {
		d := time.Duration(v) * time.Second
		p.CommitTimeout = &d
		changes = true
	}
	switch {
	case r.Args.Err() != nil:
		return nil, r.Args.Err()
	case !changes:
		return nil, errorf(-2, "need active_slot, is_committed, revert_slot or commit_timeout")
	}
	err := s.run(ctx, func(ctx context.Context) error { return s.d.SetBootState(ctx, p) })
	if errors.Is(err, ota.ErrNoBootState) || errors.Is(err, ota.ErrBadBootState) {
		return nil, failed(-1, "", err)
	}
	return nil, failed(-3, "", err)
}

const maxCommitSecs = int64(ota.MaxCommitTimeout / time.Second)

// The states of OTA.Status.
const (
	stateIdle = iota
	stateProgress
	stateError
	stateSuccess
)

// otaStatus has a parameter that the original has not: findings. Without it the
// reply, which clients poll, stays small.
func (s *Server) otaStatus(_ context.Context, r *Request) (any, error) {
	res := s.status(s.current())
	if findings, _ := r.Args.Bool("findings"); !findings {
		return res, nil
	}
	list, err := json.Marshal(s.d.Status().Findings)
	if err != nil {
		return nil, err
	}
	res = append(bytes.TrimSuffix(res, []byte("}")), `, "findings": `...)
	return json.RawMessage(append(append(res, list...), '}')), nil
}

// status returns the result of OTA.Status as of update u, nil if there was none.
func (s *Server) status(u *update) json.RawMessage {
	st := s.d.Status()
	state, text, percent := stateIdle, "idle", 0
	switch {
	case (u == nil || u.over()) && st.Busy == "update": // started by the program itself
		state, text, percent = stateProgress, "progress", int(st.Progress*100)
	case u == nil:
		// Before this start: an update that did not survive its trial.
		if l := st.State.Last; l.Outcome == ota.OutcomeReverted {
			state, text = stateError, "reverted: "+l.Reason.String()
			if l.Message != "" {
				text += ": " + printableText(l.Message)
			}
		}
	case !u.over():
		state, text, percent = stateProgress, "progress", u.percent(st.Progress)
	case u.code != resultOK:
		state, text, percent = stateError, u.text, u.percent(st.Progress)
	case u.same:
		text = u.text
	default:
		state, text, percent = stateSuccess, u.text, 100
	}
	pairs := []any{"state", int64(state), "message", text, "is_committed", st.State.Committed,
		"progress_percent", int64(percent), "commit_timeout", int64(st.State.CommitTimeout / time.Second),
		"partition", int64(st.State.Active)}
	// Not in the original: where a push goes on, once it has begun to.
	if u != nil && u.push != nil && !u.over() {
		if next := u.push.expected(); next > 0 {
			pairs = append(pairs, "next_offset", next)
		}
	}
	// Nor this: where the bytes came from, and what became of them.
	if c := st.Counts; u != nil && u.push == nil && c != (ota.Counts{}) {
		pairs = append(pairs, "downloaded", c.Downloaded, "read", c.Read, "copied", c.Copied, "skipped", c.Skipped, "written", c.Written)
	}
	return object(pairs...)
}

// object returns a JSON object with one blank after each colon and comma, as
// replies have it. Values are string, bool or int64.
func object(pairs ...any) json.RawMessage {
	b := []byte{'{'}
	for i, v := range pairs {
		switch v := v.(type) {
		case string:
			b = appendString(b, v)
		default:
			b = fmt.Append(b, v)
		}
		switch {
		case i == len(pairs)-1:
		case i%2 == 0:
			b = append(b, ": "...)
		default:
			b = append(b, ", "...)
		}
	}
	return append(b, '}')
}

// Codes of an update's result (cesanta's closed library mgos_ota, as built in
// 2025).
const (
	resultOK      = 1
	resultFailed  = -1
	resultTimeout = -5
	resultWrite   = -11
	resultDigest  = -12
	resultEnd     = -13
	resultSig     = -18
)

// Why an update was ended.
var (
	errTimedOut error = errorf(resultTimeout, "Update timed out")
	errEnded    error = errorf(resultEnd, "Unexpected end of data") // by OTA.End
)

// outcome returns code and text for the error of an update. Errors that know
// better have a method MongooseCode.
func outcome(err error) (code int, text string) {
	var m interface{ MongooseCode() (int, string) }
	var e *Error
	switch {
	case err == nil:
		return resultOK, "Update applied, rebooting"
	case errors.As(err, &e):
		return min(e.Code, -1), e.Message
	case errors.As(err, &m):
		code, text = m.MongooseCode()
		return min(code, -1), printableText(text)
	case errors.Is(err, ota.ErrDigest):
		code = resultDigest
	case errors.Is(err, ota.ErrVerify):
		code = resultWrite
	case errors.Is(err, ota.ErrUnverified):
		code = resultSig
	case errors.Is(err, io.ErrUnexpectedEOF):
		return resultEnd, "Unexpected end of data"
	default:
		code = resultFailed
	}
	return code, message(err)
}
