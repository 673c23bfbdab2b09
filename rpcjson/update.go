package rpcjson

import (
	"context"
	"errors"
	"fmt"
	"io"
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

// errSame says that a server has nothing newer.
var errSame = errors.New("rpcjson: not modified")

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
	if errors.Is(err, errSame) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer body.Close()
	img, err := s.o.Open(ctx, body)
	if err != nil {
		return false, err
	}
	res, err := s.d.Update(ctx, img, &o)
	return res.Same, err
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

// newClient returns the client for downloads, which applies the policy to
// redirects too.
func (s *Server) newClient() *http.Client {
	c := *s.fetch.Client()
	check := func(*http.Request, []*http.Request) error { return nil }
	if s.o.HTTPClient != nil {
		c = *s.o.HTTPClient
		if c.CheckRedirect != nil {
			check = c.CheckRedirect
		}
	}
	c.CheckRedirect = func(req *http.Request, via []*http.Request) error {
		err := s.fetch.CheckRedirect(req, via)
		if err == nil && s.o.AllowURL != nil {
			if err = s.o.AllowURL(req.URL); err != nil {
				err = fmt.Errorf("%w: %w", fetch.ErrRedirect, err)
			}
		}
		if err == nil {
			err = check(req, via)
		}
		return err
	}
	return &c
}

// reason returns err without the URL, which the caller knows.
func reason(err error) error {
	var e *fetch.Error
	if errors.As(err, &e) {
		return e.Err
	}
	return err
}

// download requests u with the headers of the original (mgos_ota_http_client).
// The body gives up when it waits for data longer than stall.
func (s *Server) download(ctx context.Context, target *url.URL, stall time.Duration, u *update) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		cancel(nil)
		return nil, errors.New("url: cannot be requested")
	}
	i := s.o.Info
	for _, v := range []*string{&i.App, &i.Version, &i.BuildID, &i.Platform, &i.MAC, &i.OSVersion} {
		*v = headerText(*v)
	}
	req.Header.Set("Connection", "close") // as a header it outlives redirects
	req.Header.Set("X-MGOS-Device-ID", s.o.ID+" "+i.MAC)
	req.Header.Set("User-Agent", fmt.Sprintf("%s/%s (MongooseOS/%s; %s)", i.App, i.Version, i.OSVersion, i.Platform))
	req.Header.Set("X-MGOS-FW-Version", fmt.Sprintf("%s %s %s", i.Platform, i.Version, i.BuildID))
	req.Header.Set("Accept-Encoding", "identity")

	b := &stallBody{stall: stall, cancel: cancel, ctx: ctx, taken: &u.taken}
	b.arm()
	res, err := fetch.Do(s.client, req)
	b.disarm()
	if err == nil {
		b.ReadCloser = res.Body
		if res.StatusCode == http.StatusOK {
			u.size.Store(max(0, res.ContentLength))
			return b, nil
		}
		res.Body.Close()
		err = errorf(resultFailed, "Invalid HTTP response code: %d", res.StatusCode)
		if res.StatusCode == http.StatusNotModified {
			err = errSame
		}
	} else {
		err = b.why(err)
	}
	cancel(nil)
	return nil, err
}

// headerText returns s fit to be a part of a header.
func headerText(s string) string {
	s = printableText(s)
	return s[:min(len(s), 128)]
}

// stallBody is the body of a download. The time limit runs only while data is
// awaited: slow flash is no reason to give up.
type stallBody struct {
	io.ReadCloser
	stall  time.Duration
	timer  *time.Timer
	ctx    context.Context
	cancel context.CancelCauseFunc
	taken  *atomic.Int64
}

func (b *stallBody) arm() {
	if b.timer == nil {
		b.timer = time.AfterFunc(b.stall, func() { b.cancel(errTimedOut) })
	} else {
		b.timer.Reset(b.stall)
	}
}

func (b *stallBody) disarm() { b.timer.Stop() }

// why returns the reason for which ctx ended, else err.
func (b *stallBody) why(err error) error {
	if c := context.Cause(b.ctx); c == errTimedOut {
		return c
	}
	return reason(err)
}

func (b *stallBody) Read(p []byte) (int, error) {
	b.arm()
	n, err := b.ReadCloser.Read(p)
	b.disarm()
	b.taken.Add(int64(n))
	if err != nil && err != io.EOF {
		err = b.why(err)
	}
	return n, err
}

func (b *stallBody) Close() error {
	b.disarm()
	b.cancel(nil)
	return b.ReadCloser.Close()
}
