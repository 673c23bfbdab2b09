package rpcjson

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/fetch"
)

// update is one run of OTA.Update, or of OTA.Begin and what follows.
type update struct {
	size  atomic.Int64 // announced, 0 if not known
	taken atomic.Int64 // bytes received

	push   *push // what u is part of; nil for OTA.Update
	cancel context.CancelCauseFunc

	done   chan struct{} // closed at the end; then valid:
	code   int
	text   string
	reason string
	same   bool // nothing was done: already running it
}

func (u *update) over() bool {
	select {
	case <-u.done:
		return true
	default:
		return false
	}
}

// percent returns how much of the data came, 0 if that is not known; progress is
// what the device says.
func (u *update) percent(progress float64) int {
	if size := u.size.Load(); size > 0 {
		return int(min(100, u.taken.Load()*100/size))
	}
	return int(min(1, max(0, progress)) * 100)
}

// failure returns an error of the given code that tells the result of u, which is
// over.
func (u *update) failure(code int) error {
	return &Error{Code: code, Message: fmt.Sprintf("%d %s", u.code, u.text), Reason: u.reason}
}

// errUpdateBusy is the refusal of an update while another is under way.
var errUpdateBusy = fmt.Errorf("rpcjson: an update is under way: %w", ota.ErrBusy)

// install starts u in a goroutine: open is asked for the data, which is then
// read as a firmware file and installed. It returns early if that cannot work.
// The device reboots when u succeeded, at the latest after the delay anyway.
func (s *Server) install(u *update, o ota.UpdateOptions, anyway time.Duration, open func(context.Context) (io.ReadCloser, error)) error {
	if s.o.Open == nil {
		return fmt.Errorf("rpcjson: updates are switched off: %w", ota.ErrUnsupported)
	}
	st := s.d.Status()
	switch {
	case st.Busy != "":
		return fmt.Errorf("rpcjson: %s is under way: %w", st.Busy, ota.ErrBusy)
	case !st.State.Committed:
		return ota.ErrNotCommitted
	case st.RebootPending:
		return ota.ErrRebootPending
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return ErrClosed
	case s.update != nil && !s.update.over():
		return errUpdateBusy
	case !s.due.IsZero():
		return ota.ErrRebootPending
	}
	u.done = make(chan struct{})
	ctx, cancel := context.WithCancelCause(s.ctx)
	u.cancel = cancel
	s.update = u
	s.wg.Go(func() {
		defer cancel(nil)
		same, err := s.installNow(ctx, o, open)
		u.same = same
		u.code, u.text = outcome(err)
		u.reason = reasonOf(err)
		switch {
		case err != nil:
			s.log.Error("update failed", "code", u.code, "err", err)
		case same:
			u.text = "Version is the same as current"
			s.log.Info("update not needed")
		default:
			s.log.Info("update applied")
			s.rebootIn(anyway)
		}
		close(u.done)
	})
	return nil
}

func (s *Server) installNow(ctx context.Context, o ota.UpdateOptions, open func(context.Context) (io.ReadCloser, error)) (same bool, err error) {
	if s.o.TotalTimeout > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, s.o.TotalTimeout, errTimedOut)
		defer stop()
	}
	defer func() {
		// Say why the context ended rather than that it did.
		if c := context.Cause(ctx); err != nil && (c == errTimedOut || c == errEnded) {
			err = fmt.Errorf("%w: %w", c, err)
		}
	}()
	body, err := open(ctx)
	if errors.Is(err, fetch.ErrNotModified) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer body.Close()
	img, err := s.image(ctx, body)
	if err != nil {
		return false, err
	}
	if c, ok := img.(io.Closer); ok {
		defer c.Close()
	}
	res, err := s.d.Update(ctx, img, &o)
	return res.Same, err
}

// image reads the beginning of a firmware file.
func (s *Server) image(ctx context.Context, body io.ReadCloser) (ota.Image, error) {
	if d, ok := body.(*download); ok && s.o.OpenRanges != nil && d.Ranged() {
		img, err := s.o.OpenRanges(ctx, d.File)
		if !errors.Is(err, ota.ErrUnsupported) {
			return img, err
		}
	}
	return s.o.Open(ctx, body)
}

// times returns the arguments timeout and commit_timeout.
func (s *Server) times(a *Args) (stall time.Duration, o ota.UpdateOptions) {
	stall = s.o.UpdateTimeout
	if secs, _ := a.Int("timeout", 0, int64(maxTimeout/time.Second)); secs > 0 {
		stall = time.Duration(secs) * time.Second
	}
	o.CommitTimeout = s.o.CommitTimeout
	if secs, given := a.Int("commit_timeout", 0, maxCommitSecs); given {
		o.CommitTimeout = time.Duration(secs) * time.Second
	}
	return stall, o
}

func (s *Server) otaUpdate(ctx context.Context, r *Request) (any, error) {
	file, _ := r.Args.String("file")
	rawURL, _ := r.Args.String("url")
	stall, o := s.times(r.Args)
	o.IgnoreSameVersion, _ = r.Args.Bool("ignore_same_version")
	if err := r.Args.Err(); err != nil {
		return nil, err
	}
	if file == "" && rawURL == "" && s.o.UpdateURL != "" {
		rawURL, o.IgnoreSameVersion = s.o.UpdateURL, true
	}
	if (file == "") == (rawURL == "") {
		return nil, errorf(-1, "either file or url is required")
	}
	u := &update{}
	var open func(context.Context) (io.ReadCloser, error)
	if file != "" {
		if s.o.OpenFile == nil {
			return nil, errorf(-1, "Updates from files are not allowed.")
		}
		open = func(context.Context) (io.ReadCloser, error) { return s.o.OpenFile(file) }
	} else {
		target, err := s.fetch.ParseURL(rawURL)
		if err == nil && s.o.AllowURL != nil {
			err = s.o.AllowURL(target)
		}
		if err != nil {
			return nil, errorf(-1, "url: %s", message(reason(err)))
		}
		open = func(ctx context.Context) (io.ReadCloser, error) { return s.download(ctx, target, stall, u) }
	}
	switch err := s.install(u, o, rebootAnyway, open); {
	case errors.Is(err, ota.ErrBusy):
		return nil, &Error{Code: -1, Message: "Update is already in progress", Reason: reasonOf(err)}
	case err != nil:
		return nil, failed(-1, "failed to start update", err)
	}
	select {
	case <-u.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if u.code != resultOK {
		return nil, &Error{Code: -1, Message: u.text, Reason: u.reason}
	}
	if !u.same {
		r.after = func() { s.rebootSooner(updateDelay) }
	}
	return true, nil
}

// newClient returns the client for downloads.
func (s *Server) newClient() *http.Client {
	c, check := *s.fetch.Client(), s.fetch.CheckRedirect
	if s.o.HTTPClient != nil {
		c, check = *s.o.HTTPClient, s.o.HTTPClient.CheckRedirect
	}
	c.CheckRedirect = func(req *http.Request, via []*http.Request) error {
		if s.o.AllowURL != nil {
			if err := s.o.AllowURL(req.URL); err != nil {
				return fmt.Errorf("%w: %w", fetch.ErrRedirect, err)
			}
		}
		if check == nil {
			return nil
		}
		return check(req, via)
	}
	return &c
}

// reason returns err without the URL, which the caller knows, and in the words of
// the original if it has some.
func reason(err error) error {
	var status *fetch.StatusError
	var late net.Error
	switch {
	case errors.As(err, &status):
		return errorf(resultFailed, "Invalid HTTP response code: %d", status.Code)
	case errors.Is(err, fetch.ErrStalled), errors.As(err, &late) && late.Timeout() && !errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w: %w", errTimedOut, err)
	}
	var e *fetch.Error
	if errors.As(err, &e) {
		return e.Err
	}
	return err
}

// download is a file on a server. If it is read it is read from its beginning.
type download struct {
	*fetch.File
	ctx  context.Context
	u    *update
	body io.ReadCloser // nil before the first Read
	idle func()        // closes idle connections
}

// download opens the file at a URL. It gives up when it waits for data longer than
// stall.
func (s *Server) download(ctx context.Context, target *url.URL, stall time.Duration, u *update) (io.ReadCloser, error) {
	i := &s.o.Info
	f, err := fetch.Open(ctx, target.String(), &fetch.Options{
		Policy: &s.fetch,
		Client: s.client,
		Device: &fetch.Device{ID: s.o.ID, MAC: i.MAC, App: i.App, Version: i.Version, BuildID: i.BuildID,
			Platform: i.Platform, OSVersion: i.OSVersion},
		RetryFor:  stall,
		StallTime: min(stall, fetch.DefaultStallTime),
		MinRate:   -1, // stall is the only limit that there is
		Retrying: func(err error, wait time.Duration) {
			s.log.Warn("download interrupted", "err", err, "again_in", wait)
		},
	})
	if err != nil {
		return nil, reason(err)
	}
	d := &download{File: f, ctx: ctx, u: u, idle: s.client.CloseIdleConnections}
	if s.o.HTTPClient != nil {
		d.idle = func() {}
	}
	return d, nil
}

func (d *download) Read(p []byte) (n int, err error) {
	if d.body == nil {
		d.u.size.Store(max(0, d.Size()))
		if d.body, err = d.Stream(d.ctx); err != nil {
			return 0, reason(err)
		}
	}
	n, err = d.body.Read(p)
	d.u.taken.Add(int64(n))
	if err != nil && err != io.EOF {
		err = reason(err)
	}
	return n, err
}

func (d *download) Close() error {
	if d.body != nil {
		d.body.Close()
	}
	err := d.File.Close()
	d.idle()
	return err
}
