package fetch

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/slotota/ota"
)

// remote is a file on an HTTP server.
type remote struct {
	file   *File
	o      *Options
	client http.Client
	first  *url.URL // what was asked for
	ent    entity
	known  bool   // ent is what it is
	head   []byte // the beginning of the file, if ranges work

	mu   sync.Mutex
	at   *url.URL // where the redirects led to, or first
	open *body    // what Open got, if it is the whole file, until somebody reads it
}

// temporary is an error after which the same request may succeed.
type temporary struct {
	error
	vague bool          // it may as well not
	after time.Duration // how long the server wants to be left alone
}

func (t *temporary) Unwrap() error { return t.error }

// settled returns err as it is handed on if there is no other attempt.
func settled(err error) error {
	if t, ok := err.(*temporary); ok {
		return t.error
	}
	return err
}

func openRemote(ctx context.Context, u *url.URL, o *Options) (*File, error) {
	w := &remote{o: o, first: u, at: u, ent: entity{size: -1}}
	if o.Client != nil {
		w.client = *o.Client
		w.client.Jar = nil
	} else {
		w.client = *o.Policy.Client()
		w.client.CheckRedirect = nil // o.redirects does the same
	}
	w.client.CheckRedirect = o.redirects(w.client.CheckRedirect)
	w.file = &File{name: clean(u), size: -1, src: w}
	t := retrier{w: w, limit: openAttempts}
	for {
		err := w.begin(ctx, &t)
		if err == nil {
			return w.file, nil
		}
		if err = t.again(ctx, err); err != nil {
			w.close()
			return nil, w.file.wrap(err)
		}
	}
}

// begin makes the first request.
func (w *remote) begin(ctx context.Context, t *retrier) error {
	start := time.Now()
	b, err := w.get(ctx, 0, w.o.head, t.window())
	if t.spent(0, time.Since(start)); err != nil {
		return err
	}
	if b.ent.size > w.o.MaxSize {
		b.close()
		return because(ErrTooLarge, "%d bytes, at most %d", b.ent.size, w.o.MaxSize)
	}
	if b.partial && b.ent.size >= 0 {
		head := make([]byte, b.end)
		for n := 0; n < len(head) && err == nil; {
			var k int
			k, err = b.read(head[n:], t)
			n += k
		}
		if err == nil {
			err = b.finish(t)
		}
		b.close()
		if err != nil {
			return err
		}
		w.head, w.file.ranged = head, true
	} else if b.partial {
		// Whoever knows ranges but not the size does not really.
		b.close()
	} else {
		b.bind(context.Background())
		w.open = b
	}
	w.ent, w.file.size, w.known = b.ent, b.ent.size, true
	b.open() // with the limits for the file that is known now
	return nil
}

func (w *remote) close() error {
	w.mu.Lock()
	b := w.open
	w.open = nil
	w.mu.Unlock()
	if b != nil {
		b.close()
	}
	if w.o.Client == nil {
		w.client.CloseIdleConnections()
	}
	return nil
}

func (w *remote) read(ctx context.Context, rs []ota.Range) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	r := &reader{w: w, ctx: ctx, cancel: cancel, rs: rs, t: retrier{w: w}, turn: make(chan struct{}, 1)}
	if rs != nil {
		return r, nil
	}
	r.rs = w.file.whole()
	r.open = w.file.size < 0
	w.mu.Lock()
	r.body, w.open = w.open, nil
	w.mu.Unlock()
	if r.body != nil {
		r.body.bind(ctx)
		r.span = len(r.rs)
	}
	return r, nil
}

// get asks for the bytes from off to end, to the last one if end is less than 0.
// window is the time for the answer to begin.
func (w *remote) get(ctx context.Context, off, end int64, window time.Duration) (*body, error) {
	w.mu.Lock()
	u := w.at
	w.mu.Unlock()
	b, err := w.ask(ctx, u, off, end, window)
	if err == nil || u == w.first || ctx.Err() != nil {
		return b, err
	}
	var status *StatusError
	var again *temporary
	if !errors.As(err, &status) && !errors.As(err, &again) {
		return nil, err
	}
	// What a redirect led to need not last as long as what it came from.
	w.mu.Lock()
	w.at = w.first
	w.mu.Unlock()
	return w.ask(ctx, w.first, off, end, window)
}

func (w *remote) ask(ctx context.Context, u *url.URL, off, end int64, window time.Duration) (*body, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	b := &body{w: w, window: window, need: 1}
	b.ctx, b.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	b.bind(ctx)
	r := (&http.Request{Method: http.MethodGet, URL: u, Header: http.Header{}}).WithContext(b.ctx)
	w.o.Device.set(r.Header)
	if sameOrigin(u, w.first) {
		for k, v := range w.o.Header {
			r.Header[http.CanonicalHeaderKey(k)] = slices.Clone(v)
		}
	}
	r.Header.Set("Accept-Encoding", "identity")
	r.Header.Del("Range")
	r.Header.Del("If-Range")
	if off > 0 || end >= 0 {
		r.Header.Set("Range", rangeHeader(off, end))
		if w.ent.ifRange != "" {
			r.Header.Set("If-Range", w.ent.ifRange)
		}
	}
	w.file.requests.Add(1)
	began := b.wait(window)
	res, err := Do(&w.client, r)
	b.came(began, 1)
	if err == nil {
		b.rc = res.Body
		err = b.accept(res, off, end)
	} else {
		err = b.failure(err)
	}
	if err != nil {
		b.close()
		return nil, err
	}
	if res.Request != nil {
		w.mu.Lock()
		w.at = res.Request.URL
		w.mu.Unlock()
	}
	return b, nil
}

// body is an answer: bytes of the file from at to end, to be read within limits
// of time.
type body struct {
	w       *remote
	rc      io.ReadCloser
	ent     entity
	from    int64 // where it began
	at, end int64 // end is -1 if it is not known
	partial bool
	ended   bool // io.EOF was seen
	empty   int  // reads in a row that brought nothing

	ctx    context.Context
	cancel context.CancelCauseFunc
	unbind func() bool

	// need is the number of bytes that must come in a window of waiting.
	timer          *time.Timer
	window, waited time.Duration
	need           int64
}

// accept checks an answer to a request for the bytes from off to end.
func (b *body) accept(res *http.Response, off, end int64) error {
	w := b.w
	switch res.StatusCode {
	case http.StatusOK, http.StatusPartialContent:
	case http.StatusNotModified, http.StatusRequestedRangeNotSatisfiable:
		if w.known {
			return because(ErrChanged, "status %d", res.StatusCode)
		} else if res.StatusCode == http.StatusNotModified {
			return ErrNotModified
		}
		fallthrough
	default:
		err := &StatusError{res.StatusCode, retryAfter(res.Header.Get("Retry-After"), time.Now())}
		switch err.Code {
		case http.StatusNotImplemented, http.StatusHTTPVersionNotSupported:
			return err
		case http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests:
			return &temporary{error: err, after: err.RetryAfter}
		}
		if err.Code < 500 {
			return err
		}
		return &temporary{error: err, after: err.RetryAfter}
	}
	if enc := strings.Join(res.Header["Content-Encoding"], ","); enc != "" && !strings.EqualFold(enc, "identity") || res.Uncompressed {
		return because(ErrResponse, "it is compressed for the transfer")
	}
	if res.StatusCode == http.StatusOK {
		b.ent = entityOf(res, res.ContentLength)
		b.end = res.ContentLength
		if w.known && b.end < 0 {
			b.end = w.ent.size
		}
		switch {
		case !w.known:
		case w.ent.differs(&b.ent):
			return ErrChanged
		case off > 0 && !w.ent.is(&b.ent):
			return because(ErrNoRanges, "nothing says that it is the same file still")
		}
		return nil
	}
	c, ok := parseContentRange(strings.Join(res.Header["Content-Range"], ","))
	switch {
	case off == 0 && end < 0:
		return because(ErrResponse, "a part, for no reason")
	case !ok || c.off < 0: // as in multipart/byteranges
		return because(ErrResponse, "a part without a valid Content-Range")
	case c.off != off || end >= 0 && c.end > end:
		return because(ErrResponse, "bytes %d to %d instead of %d to %d", c.off, c.end-1, off, end-1)
	case res.ContentLength >= 0 && res.ContentLength != c.end-c.off:
		return because(ErrResponse, "%d bytes, but Content-Range says %d", res.ContentLength, c.end-c.off)
	}
	b.ent, b.partial = entityOf(res, c.size), true
	b.from, b.at, b.end = c.off, c.off, c.end
	if w.known && w.ent.differs(&b.ent) {
		return ErrChanged
	}
	return nil
}

// bind makes the end of ctx that of b, instead of that of the context before.
func (b *body) bind(ctx context.Context) {
	if b.unbind != nil {
		b.unbind()
	}
	b.unbind = context.AfterFunc(ctx, func() { b.cancel(context.Cause(ctx)) })
}

func (b *body) close() {
	b.unbind()
	b.timer.Stop()
	b.cancel(nil)
	if b.rc != nil {
		b.rc.Close()
	}
}

// wait lets the time run in which something must come, at most limit.
func (b *body) wait(limit time.Duration) (began time.Time) {
	if left := min(b.window-b.waited, limit); b.timer == nil {
		b.timer = time.AfterFunc(left, func() { b.cancel(ErrStalled) })
	} else {
		b.timer.Reset(left)
	}
	return time.Now()
}

// came stops it: n bytes came.
func (b *body) came(began time.Time, n int) (spent time.Duration) {
	b.timer.Stop()
	spent = time.Since(began)
	b.waited += spent
	if b.need -= int64(n); b.need <= 0 {
		b.open()
	}
	return spent
}

// open begins a window.
func (b *body) open() {
	o := b.w.o
	b.waited, b.window = 0, o.StallTime
	b.need = max(1, int64(float64(o.MinRate)*o.StallTime.Seconds()))
	if b.w.known && !b.w.ent.resumable() && o.RetryFor > 0 {
		b.window, b.need = o.RetryFor, 1
	}
}

// read reads some bytes, or returns an error; io.EOF if the end is not known.
func (b *body) read(p []byte, t *retrier) (n int, err error) {
	if b.end >= 0 {
		p = p[:min(int64(len(p)), b.end-b.at)]
	}
	began := b.wait(t.left())
	n, err = b.rc.Read(p)
	if n < 0 || n > len(p) {
		return 0, because(ErrResponse, "an impossible count of bytes")
	}
	t.spent(n, b.came(began, n))
	b.at += int64(n)
	b.w.file.downloaded.Add(int64(n))
	b.ended = b.ended || err == io.EOF
	switch {
	case n > 0:
		b.empty = 0
		return n, nil // an error comes again
	case err == nil:
		if b.empty++; b.empty < 100 {
			return 0, nil
		}
		err = io.ErrNoProgress
	case err == io.EOF && b.end < 0:
		return 0, io.EOF
	case err == io.EOF:
		err = io.ErrUnexpectedEOF
	}
	return 0, b.failure(err)
}

// finish returns an error if there is more than there should be. Only then can
// the connection be used again, too.
func (b *body) finish(t *retrier) error {
	if b.ended {
		return nil
	}
	var one [1]byte
	began := b.wait(t.left())
	n, _ := b.rc.Read(one[:])
	t.spent(0, b.came(began, n))
	if n > 0 {
		return because(ErrResponse, "more bytes than it announced")
	}
	return nil // what else went wrong no longer matters
}

// failure says why err came, and whether to try again.
func (b *body) failure(err error) error {
	switch cause := context.Cause(b.ctx); {
	case cause == ErrStalled:
		return &temporary{error: ErrStalled}
	case cause != nil:
		return cause
	}
	err = safe(err)
	var cert *tls.CertificateVerificationError
	for _, is := range []error{ErrURL, ErrPolicy, ErrAddress, ErrRedirect, http.ErrSchemeMismatch} {
		if errors.Is(err, is) {
			return err
		}
	}
	if errors.As(err, &cert) {
		return err
	}
	return &temporary{error: err, vague: errors.Is(err, ErrResponse)}
}
