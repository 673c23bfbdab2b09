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
)

// update is one run of OTA.Update, or of OTA.Begin and what follows.
type update struct {
	size  int64        // announced, 0 if not known
	taken atomic.Int64 // bytes received

	done chan struct{} // closed at the end; then valid:
	code int
	text string
	same bool // nothing was done: already running it
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
	if u.size > 0 {
		return int(min(100, u.taken.Load()*100/u.size))
	}
	return int(min(1, max(0, progress)) * 100)
}

// errUpdateBusy is the refusal of an update while another is under way.
var errUpdateBusy = fmt.Errorf("rpcjson: an update is under way: %w", ota.ErrBusy)

// errSame says that a server has nothing newer.
var errSame = errors.New("rpcjson: not modified")

// install starts u in a goroutine: open is asked for the data, which is then
// read as a firmware file and installed. It returns early if that cannot work.
// The device reboots when u succeeded, at the latest after the delay anyway.
func (s *Server) install(u *update, o ota.UpdateOptions, p *push, anyway time.Duration, open func(context.Context) (io.ReadCloser, error)) error {
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
	s.update = u
	if p != nil {
		s.push = p
	}
	s.wg.Go(func() {
		same, err := s.installNow(u, o, open)
		u.same = same
		u.code, u.text = outcome(err)
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

func (s *Server) installNow(u *update, o ota.UpdateOptions, open func(context.Context) (io.ReadCloser, error)) (same bool, err error) {
	ctx, cancel := context.WithCancelCause(s.ctx)
	defer cancel(nil)
	if s.o.TotalTimeout > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, s.o.TotalTimeout, errTimedOut)
		defer stop()
	}
	defer func() {
		// Say why the context ended rather than that it did.
		if c := context.Cause(ctx); err != nil && errors.Is(c, errTimedOut) {
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
		target, err := url.Parse(rawURL)
		if err == nil {
			err = s.checkURL(target)
		} else {
			err = errors.New("need a URL") // the error of Parse quotes all of it
		}
		if err != nil {
			return nil, errorf(-1, "url: %s", message(err))
		}
		open = func(ctx context.Context) (io.ReadCloser, error) { return s.download(ctx, target, stall, u) }
	}
	switch err := s.install(u, o, nil, rebootAnyway, open); {
	case errors.Is(err, ota.ErrBusy):
		return nil, errorf(-1, "Update is already in progress")
	case err != nil:
		return nil, failed(-1, "failed to start update", err)
	}
	select {
	case <-u.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if u.code != resultOK {
		return nil, errorf(-1, "%s", u.text)
	}
	if !u.same {
		r.after = func() { s.rebootIn(updateDelay) }
	}
	return true, nil
}

// checkURL returns an error if u must not be requested.
func (s *Server) checkURL(u *url.URL) error {
	switch {
	case u.Host == "":
		return errors.New("need a host")
	case u.Scheme == "http" && !s.o.AllowHTTP:
		return errors.New("need https")
	case u.Scheme != "http" && u.Scheme != "https":
		return fmt.Errorf("scheme %s: need https", ota.Quote(u.Scheme))
	case s.o.AllowURL == nil:
		return nil
	}
	return s.o.AllowURL(u)
}

// newClient returns the client for downloads, which applies the policy to
// redirects too.
func (s *Server) newClient() *http.Client {
	var c http.Client
	if s.o.HTTPClient != nil {
		c = *s.o.HTTPClient
	} else {
		c.Transport = &http.Transport{
			DialContext:           (&net.Dialer{Timeout: 30 * time.Second}).DialContext,
			TLSHandshakeTimeout:   30 * time.Second,
			ResponseHeaderTimeout: time.Minute,
			ForceAttemptHTTP2:     true,
		}
	}
	check := c.CheckRedirect
	c.CheckRedirect = func(req *http.Request, via []*http.Request) error {
		if len(via) > 3 {
			return errors.New("more than 3 redirects")
		}
		if err := s.checkURL(req.URL); err != nil {
			return fmt.Errorf("redirect: %w", err)
		}
		if check != nil {
			return check(req, via)
		}
		return nil
	}
	return &c
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
	i := &s.o.Info
	req.Header.Set("Connection", "close") // as a header it outlives redirects
	req.Header.Set("X-MGOS-Device-ID", s.o.ID+" "+i.MAC)
	req.Header.Set("User-Agent", fmt.Sprintf("%s/%s (MongooseOS/%s; %s)", i.App, i.Version, i.OSVersion, i.Platform))
	req.Header.Set("X-MGOS-FW-Version", fmt.Sprintf("%s %s %s", i.Platform, i.Version, i.BuildID))
	req.Header.Set("Accept-Encoding", "identity")

	b := &stallBody{stall: stall, cancel: cancel, ctx: ctx, taken: &u.taken}
	b.arm()
	res, err := s.client.Do(req)
	b.disarm()
	if err == nil {
		b.ReadCloser = res.Body
		if res.StatusCode == http.StatusOK {
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
	if c := context.Cause(b.ctx); errors.Is(c, errTimedOut) {
		return c
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		return ue.Err // without the URL, which may hold a password
	}
	return err
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
