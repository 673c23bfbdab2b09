package rpcjson

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/slotota/ota"
)

// The states of OTA.Status.
const (
	StateIdle     = stateIdle
	StateProgress = stateProgress // an update is under way
	StateError    = stateError    // the last update failed
	StateSuccess  = stateSuccess  // about to reboot
)

// DeviceStatus is the result of OTA.Status.
type DeviceStatus struct {
	State         int     `json:"state"`
	Message       string  `json:"message"`
	Committed     bool    `json:"is_committed"`
	Percent       float64 `json:"progress_percent"`
	CommitTimeout int64   `json:"commit_timeout"` // seconds
	ActiveSlot    int     `json:"partition"`
	// NextOffset is the offset of the data that a push session expects, if it
	// has taken any; 0 also if the device does not tell.
	NextOffset int64 `json:"next_offset,omitempty"`
	// The counts of [ota.Counts] for the newest OTA.Update since the start, in
	// bytes; all 0 also if the device does not tell.
	Downloaded int64 `json:"downloaded,omitempty"`
	Read       int64 `json:"read,omitempty"`
	Copied     int64 `json:"copied,omitempty"`
	Skipped    int64 `json:"skipped,omitempty"`
	Written    int64 `json:"written,omitempty"`
}

// Status calls OTA.Status.
func (c *Client) Status(ctx context.Context) (s DeviceStatus, err error) {
	err = c.Call(ctx, "OTA.Status", nil, &s)
	return s, err
}

// Findings returns what the device finds that would stop a rollback; nothing if it
// does not look. It calls OTA.Status with a parameter that other devices ignore.
func (c *Client) Findings(ctx context.Context) ([]ota.Finding, error) {
	var res struct {
		Findings []ota.Finding `json:"findings"`
	}
	err := c.Call(ctx, "OTA.Status", map[string]bool{"findings": true}, &res)
	return res.Findings, err
}

// BootState calls OTA.GetBootState.
func (c *Client) BootState(ctx context.Context) (s ota.BootState, err error) {
	err = c.Call(ctx, "OTA.GetBootState", nil, &s)
	return s, err
}

// ErrUnknown says that the device was lost sight of during an update, and does
// not say afterwards that it was installed.
var ErrUnknown = errors.New("the device does not say that the update was installed")

// PushOptions configure [Client.Push]. The zero value is safe.
type PushOptions struct {
	// ChunkSize is the number of bytes of each OTA.Write; 0 means what suits the
	// channel, mostly 32 KiB. It becomes smaller if the device cannot take so
	// much at once.
	ChunkSize int
	// Timeout is how long the device waits for data before it gives up, and
	// CommitTimeout the time for the commit after the reboot; nil leaves the
	// choice to the device.
	Timeout, CommitTimeout *time.Duration
	// Begin replaces all parameters of OTA.Begin, if not nil.
	Begin json.RawMessage
	// Resume continues a session of the same bundle that an earlier Push has
	// left open, instead of refusing. The device verifies the whole.
	Resume bool
	// RetryFor is how long an unreachable device is waited for; 0 means one
	// minute.
	RetryFor time.Duration
	// Progress, if not nil, is told how many bytes the device has taken, by the
	// goroutine that called Push.
	Progress func(done, total int64)
}

const (
	defaultChunk = 32 << 10
	minChunk     = 512
	maxRestarts  = 2
	stuckFor     = 10 * time.Minute // without a byte taken, while the device answers
	maxEndDelay  = 2 * time.Second  // between calls of OTA.End to a device at work
	probeOffset  = math.MaxInt32    // no bundle ends exactly there
)

// Push installs the bundle in the size bytes of r: OTA.Status, OTA.Begin, OTA.Write
// until all is there, OTA.End. When it returns nil the device has verified and
// selected the firmware, and is about to reboot into it.
//
// A call without a reply is repeated; the device knows repeated chunks from new
// ones. If it expects another offset the push continues there, and if it has
// restarted meanwhile the push starts anew. If Push gives up it ends the session,
// so that the device can be updated again at once; an unreachable device gives up
// by itself after the timeout.
//
// Over HTTP and WebSocket, a device that is served by this package gets up to three
// chunks at a time, each in a call of its own, so that r is read concurrently.
//
// An error that comes before the last OTA.Write is sent means that the firmware is
// not installed, as a device needs the whole bundle (Mongoose OS before 2020: all
// but the central directory of the zip file). A later one leaves that open: although
// a reply was lost, or ctx has ended, the device may have all the data, and then it
// installs them, when the OTA.End comes that ends the session, or without one. In
// this case ask [Client.Status] and [Client.BootState] once the device answers: the
// firmware is installed if the state is [StateSuccess], or if the active slot is
// another one than before the push.
//
// The error wraps [ota.ErrBusy] if another update is under way,
// [ota.ErrRebootPending] if the device is about to reboot, [ErrUnknown] or what
// [Client.Call] says. o may be nil.
func (c *Client) Push(ctx context.Context, r io.ReaderAt, size int64, o *PushOptions) error {
	if size <= 0 {
		return fmt.Errorf("rpcjson: push of %d bytes: %w", size, ota.ErrInvalid)
	}
	p := &pusher{c: c, r: r, size: size, ahead: 1, base64: newBase64Encoder()}
	if o != nil {
		p.o = *o
	}
	p.chunk = p.o.ChunkSize
	if s, ok := c.ch.(interface{ ChunkSize() int }); ok && p.chunk <= 0 {
		p.chunk = s.ChunkSize()
	}
	if p.chunk <= 0 {
		p.chunk = defaultChunk
	}
	if p.o.RetryFor <= 0 {
		p.o.RetryFor = time.Minute
	}
	err := p.run(ctx)
	if err != nil && p.open && p.off < size {
		// An End before the end aborts.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), min(5*time.Second, c.o.Timeout))
		defer cancel()
		_ = c.call(ctx, "OTA.End", nil, nil)
	}
	return err
}

// pusher is the state of one Push.
type pusher struct {
	c      *Client
	r      io.ReaderAt
	size   int64
	o      PushOptions
	before ota.BootState
	chunk  int
	off    int64 // next byte to be sent
	top    int64 // most that was ever taken
	open   bool  // there is a session of ours

	ahead  int // how many calls of OTA.Write may be under way
	base64 *base64Encoder
	memory [maxWindow]struct{ data, frame []byte } // for a chunk, and the request with it
}

func (p *pusher) run(ctx context.Context) error {
	st, err := p.c.Status(ctx)
	if err != nil {
		return err
	}
	if p.before, err = p.c.BootState(ctx); err != nil {
		return err
	}
	switch {
	case st.State == StateProgress && p.o.Resume && st.NextOffset > 0 && st.NextOffset <= p.size:
		p.off, p.open = st.NextOffset, true
	case st.State == StateProgress && p.o.Resume:
		w := newWaiter(p.o.RetryFor)
		for p.off, err = p.probe(ctx); err != nil; p.off, err = p.probe(ctx) {
			if !again(err) {
				return err
			}
			if err := w.wait(ctx, err); err != nil {
				return err
			}
		}
		p.open = true
	case st.State == StateProgress:
		return fmt.Errorf("rpcjson: push: an update is in progress: %w", ota.ErrBusy)
	case st.State == StateSuccess:
		return fmt.Errorf("rpcjson: push: %w", ota.ErrRebootPending)
	default:
		if err := p.begin(ctx); err != nil {
			return err
		}
	}
	for restarts := 0; ; restarts++ {
		err := p.send(ctx)
		if err == nil {
			break
		}
		if !notStarted(err) || restarts == maxRestarts {
			return err
		}
		p.open = false
		if err := p.begin(ctx); err != nil {
			return err
		}
	}
	return p.end(ctx)
}

func (p *pusher) begin(ctx context.Context) error {
	var params any = p.o.Begin
	if p.o.Begin == nil {
		m := struct {
			Timeout       *int64 `json:"timeout,omitempty"`
			CommitTimeout *int64 `json:"commit_timeout,omitempty"`
			Size          int64  `json:"size"`
			Window        int    `json:"window,omitempty"`
		}{seconds(p.o.Timeout), seconds(p.o.CommitTimeout), p.size, 0}
		if ch, ok := p.c.ch.(interface{ Window() int }); ok {
			m.Window = min(ch.Window(), maxWindow)
		}
		params = m
	}
	p.off, p.top, p.ahead = 0, 0, 1
	w := newWaiter(p.o.RetryFor)
	for {
		var raw json.RawMessage
		err := p.c.Call(ctx, "OTA.Begin", params, &raw)
		if err == nil {
			p.open = true
			var res struct{ Window int }
			if json.Unmarshal(raw, &res) == nil { // the original answers null
				p.ahead = max(1, min(res.Window, maxWindow))
			}
			return nil
		}
		if !again(err) {
			return err
		}
		if err := w.wait(ctx, err); err != nil {
			return err
		}
	}
}

// seconds returns d in whole seconds, rounded up, nil for nil.
func seconds(d *time.Duration) *int64 {
	if d == nil {
		return nil
	}
	s := int64((max(0, *d) + time.Second - 1) / time.Second)
	return &s
}

// send sends the data from p.off on.
func (p *pusher) send(ctx context.Context) error {
	w := newWaiter(p.o.RetryFor)
	progressed := time.Now()
	resyncs, tries := 0, 0
	smooth := true // after a failure there is one call at a time, until it succeeds
	for p.off < p.size {
		if p.off > p.top {
			p.top, progressed, resyncs = p.off, time.Now(), 0
		}
		p.progress()
		n := p.next(p.off)
		var err error
		if smooth && p.ahead > 1 {
			n, err = p.stream(ctx)
		} else {
			err = p.write(ctx, p.off, n, 0)
		}
		smooth = err == nil
		if err == nil {
			p.off += int64(n)
		} else {
			next, ok := expected(err)
			var re *readError
			switch {
			case errors.As(err, &re):
				return err
			case ok && next >= 0 && next <= p.size:
				p.off = next
				// Bounded unless there is progress.
				if resyncs++; resyncs > 20 {
					return err
				}
			case tooLong(err) && n > 1:
				p.chunk = n / 2
				continue
			case again(err):
				tries++
				if err := w.wait(ctx, err); err != nil {
					return err
				}
				if tries < 2 {
					continue
				}
				// Did the chunk get there? If so the device may be busy with it, and
				// recognises it when it comes again. If not, perhaps it is too
				// large for something on the way.
				next, perr := p.probe(ctx)
				if perr == nil {
					w.reset() // it can be reached
				}
				switch {
				case again(perr):
				case perr != nil:
					return perr
				case next == p.off:
					p.chunk = max(min(n, minChunk), n/2)
				case next != p.off+int64(n) || tries > 4:
					p.off, tries = next, 0
				}
				if time.Since(progressed) > stuckFor {
					return err
				}
				continue
			case otherData(err):
				// A longer chunk had arrived after all.
				next, perr := p.probe(ctx)
				if again(perr) {
					if err := w.wait(ctx, perr); err != nil {
						return err
					}
					continue
				}
				if perr != nil {
					return perr
				}
				if resyncs++; resyncs > 20 {
					return err
				}
				p.off = next
			default:
				return err
			}
		}
		tries = 0
		w.reset()
	}
	p.progress()
	return nil
}

func (p *pusher) progress() {
	if p.o.Progress != nil {
		p.o.Progress(p.off, p.size)
	}
}

// stream sends the data from p.off on with up to p.ahead calls under way, until one
// fails. It returns the error of the call for the n bytes at p.off, nil when all is
// sent.
func (p *pusher) stream(ctx context.Context) (n int, err error) {
	type sending struct {
		n     int
		reply chan error
	}
	var calls []sending // under way, in order
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		cancel()
		for _, c := range calls {
			<-c.reply
		}
	}()
	place := 0
	for end := p.off; p.off < p.size; {
		for len(calls) < p.ahead && end < p.size {
			c := sending{p.next(end), make(chan error, 1)}
			go func(off int64, place int) { c.reply <- p.write(ctx, off, c.n, place) }(end, place)
			calls = append(calls, c)
			end += int64(c.n)
			place = (place + 1) % p.ahead
		}
		c := calls[0]
		calls = calls[1:]
		if err := <-c.reply; err != nil {
			return c.n, err
		}
		p.off += int64(c.n)
		p.progress()
	}
	return 0, nil
}

// next returns the length of a chunk at off.
func (p *pusher) next(off int64) int { return int(min(int64(p.chunk), p.size-off)) }

// write sends the n bytes at off, and uses p.memory[place] for that.
func (p *pusher) write(ctx context.Context, off int64, n, place int) error {
	m := &p.memory[place]
	if cap(m.data) < n {
		m.data = make([]byte, n)
		m.frame = make([]byte, 0, base64.StdEncoding.EncodedLen(n)+1<<10) // with room for auth
	}
	data := m.data[:n]
	if k, err := p.r.ReadAt(data, off); k < n {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return &readError{off, err}
	}
	req, err := p.c.request(m.frame, "OTA.Write", func(b []byte) ([]byte, error) {
		b = strconv.AppendInt(append(b, `{"offset":`...), off, 10)
		b = p.base64.append(append(b, `,"data":"`...), data)
		return append(b, `"}`...), nil
	})
	if err != nil {
		return err
	}
	// The device takes one after the other.
	ctx, cancel := context.WithTimeout(ctx, time.Duration(p.ahead)*p.c.o.Timeout)
	defer cancel()
	return p.c.do(ctx, req, nil)
}

// readError says that the data of a push could not be read.
type readError struct {
	off int64
	err error
}

func (e *readError) Error() string {
	return fmt.Sprintf("rpcjson: push: read at byte %d: %v", e.off, e.err)
}

func (e *readError) Unwrap() error { return e.err }

// probe asks the device which offset it expects, by a write that it must refuse.
func (p *pusher) probe(ctx context.Context) (int64, error) {
	err := p.c.Call(ctx, "OTA.Write", map[string]any{"offset": probeOffset, "data": []byte{0}}, nil)
	if next, ok := expected(err); ok && next >= 0 && next <= p.size {
		return next, nil
	}
	if err == nil {
		err = fmt.Errorf("rpcjson: push: the device takes data at any offset: %w", ErrBadReply)
	}
	return 0, err
}

func (p *pusher) end(ctx context.Context) error {
	w := newWaiter(p.o.RetryFor)
	for {
		err := p.c.Call(ctx, "OTA.End", nil, nil)
		if err == nil || !again(err) && !notStarted(err) {
			return err
		}
		over, verdict := p.c.verdict(ctx, p.before)
		if over {
			return verdict
		}
		if verdict == nil {
			w.extend(maxEndDelay) // it answers, and is at work
		}
		if err := w.wait(ctx, err); err != nil {
			return err
		}
	}
}

// verdict asks the device how an update ended whose reply was lost. The error is
// nil if the update is under way, or over with success.
func (c *Client) verdict(ctx context.Context, before ota.BootState) (over bool, err error) {
	st, err := c.Status(ctx)
	var e *Error
	if err != nil && (!errors.As(err, &e) || e.Code != 404) { // the oldest devices have no OTA.Status
		return !again(err), err
	}
	switch st.State {
	case StateProgress:
		return false, nil
	case StateSuccess:
		return true, nil
	case StateError:
		return true, &Error{Code: -1, Message: st.Message}
	}
	now, err := c.BootState(ctx)
	switch {
	case err != nil:
		return !again(err), err
	case now.Active != before.Active, now.Committed != before.Committed:
		return true, nil // it has rebooted already
	case strings.Contains(st.Message, sameText):
		return true, nil
	}
	return true, fmt.Errorf("rpcjson: %w; its status is %s", ErrUnknown, ota.Quote(st.Message))
}

// sameText is the message of an update that was not needed.
const sameText = "Version is the same"

// PullOptions configure [Client.Update].
type PullOptions struct {
	// URL is what the device downloads, File what it opens; without both it
	// chooses itself.
	URL, File string
	// Timeout and CommitTimeout are as in PushOptions.
	Timeout, CommitTimeout *time.Duration
	// IgnoreSameVersion makes the device do nothing if it runs that version.
	IgnoreSameVersion bool
	// RetryFor is how long an unreachable device is waited for; 0 means one
	// minute.
	RetryFor time.Duration
	// Progress, if not nil, is told the progress about once per second.
	Progress func(percent float64)
}

// Update calls OTA.Update, whose reply comes when the update is over, and watches
// OTA.Status meanwhile. If the reply is lost or overdue the status and the boot
// state tell how it ended, so that a broken connection alone is no failure. When
// it returns nil the firmware is installed, or nothing needed to be done (the boot
// state is unchanged then). The update goes on if ctx ends.
//
// Errors are those of [Client.Call], or wrap [ErrUnknown]. o may be nil.
func (c *Client) Update(ctx context.Context, o *PullOptions) error {
	if o == nil {
		o = &PullOptions{}
	}
	before, err := c.BootState(ctx)
	if err != nil {
		return err
	}
	params := struct {
		URL           string `json:"url,omitempty"`
		File          string `json:"file,omitempty"`
		Timeout       *int64 `json:"timeout,omitempty"`
		CommitTimeout *int64 `json:"commit_timeout,omitempty"`
		Same          bool   `json:"ignore_same_version,omitempty"`
	}{o.URL, o.File, seconds(o.Timeout), seconds(o.CommitTimeout), o.IgnoreSameVersion}

	callCtx, cancel := context.WithCancel(ctx)
	reply := make(chan error, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		reply <- c.call(callCtx, "OTA.Update", params, nil)
	}()
	defer func() { cancel(); <-ended }()

	retry := o.RetryFor
	if retry <= 0 {
		retry = time.Minute
	}
	w := newWaiter(retry)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	atWork := time.Now() // when the update was last known, or must be assumed, to be under way
	var lost error       // why there will be no reply
	for {
		select {
		case err := <-reply:
			var e *Error
			if err == nil || !again(err) || dialFailed(err) || errors.As(err, &e) && refused(e) {
				return err
			}
			lost = err
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("rpcjson: OTA.Update: %w: %w", ErrNoReply, context.Cause(ctx))
		}
		if lost != nil {
			over, err := c.verdict(ctx, before)
			switch {
			case over:
				return err
			case err != nil:
				if err := w.wait(ctx, lost); err != nil {
					return err
				}
			default:
				w.reset()
			}
		}
		st, err := c.Status(ctx)
		limit := c.o.Timeout
		var e *Error
		if errors.As(err, &e) && e.Code == 404 {
			limit = max(limit, DefaultUpdateTimeout) // it cannot tell, and gives up by then
		}
		if err == nil && st.State == StateProgress {
			atWork = time.Now()
			if o.Progress != nil {
				o.Progress(st.Percent)
			}
		} else if time.Since(atWork) > limit {
			cancel() // the reply is overdue
		}
	}
}

// again reports whether a call that failed with err may be repeated: nobody
// answered, or somebody who is overloaded or about to reboot.
func again(err error) bool {
	var e *Error
	if errors.As(err, &e) {
		switch e.Code {
		case 418, 429, 502, 503, 504:
			return true
		}
		return e.Message == "one OTA.Write at a time"
	}
	return errors.Is(err, ErrNoReply)
}

func notStarted(err error) bool { return hasMessage(err, errNotStarted.Message) }

func otherData(err error) bool { return hasMessage(err, "was already written with other data") }

func hasMessage(err error, part string) bool {
	var e *Error
	return errors.As(err, &e) && strings.Contains(e.Message, part)
}

// tooLong reports whether a frame was refused for its length, or cut on its way.
func tooLong(err error) bool {
	var e *Error
	return errors.As(err, &e) && (e.Code == 413 || e.Code == 400 && strings.Contains(e.Message, "Invalid request"))
}

var expectedOffset = regexp.MustCompile(`^Expected offset ([0-9]{1,18}), got `)

// expected returns the offset that a device says it expects.
func expected(err error) (int64, bool) {
	var e *Error
	if !errors.As(err, &e) {
		return 0, false
	}
	m := expectedOffset.FindStringSubmatch(e.Message)
	if m == nil {
		return 0, false
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	return n, err == nil
}

// waiter spaces out attempts, ever more, and bounds the time they take together.
type waiter struct {
	limit time.Duration
	start time.Time // of the first failure in a row
	delay time.Duration
}

func newWaiter(limit time.Duration) *waiter { return &waiter{limit: limit} }

// reset says that the device answered.
func (w *waiter) reset() { w.delay = 0 }

// extend says that the device answered, but has to be asked again: the time begins
// anew, and the pauses go on growing, up to most.
func (w *waiter) extend(most time.Duration) {
	w.start, w.delay = time.Now(), min(w.delay, most)
}

// wait waits for the next attempt. It returns cause once the time is used up.
func (w *waiter) wait(ctx context.Context, cause error) error {
	if w.delay == 0 {
		w.start, w.delay = time.Now(), 100*time.Millisecond
	}
	if time.Since(w.start) >= w.limit {
		return cause
	}
	t := time.NewTimer(w.delay)
	defer t.Stop()
	w.delay = min(2*w.delay, 5*time.Second)
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", context.Cause(ctx), cause)
	}
}
