package fetch

import (
	"context"
	"io"
	"math"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/slotota/ota"
)

// Defaults of Options.
const (
	DefaultGap       = 8 << 10
	DefaultMaxSkip   = 32 << 20
	DefaultRetryFor  = 2 * time.Minute
	DefaultStallTime = 30 * time.Second
	DefaultMinRate   = 100
)

const (
	// headSize is what Open asks for: package bundle begins with as much, and
	// the answer tells the size.
	headSize = 64 << 10
	// openAttempts is how often Open asks. A URL that never worked is more
	// likely wrong than one that did.
	openAttempts = 3
	// vagueAttempts is how often in a row what hardly passes with time is
	// borne: answers that are not understood, or end before a new byte.
	vagueAttempts = 5
	// recovered is the number of bytes after which earlier failures are
	// forgotten.
	recovered = 16 << 10
	// minDelay and maxDelay are the waits between attempts, before jitter.
	minDelay = 500 * time.Millisecond
	maxDelay = 30 * time.Second
	// readAhead is how many bytes are left of an answer when the next one is
	// asked for.
	readAhead = 128 << 10
	// scratchSize is that of the buffer for bytes that nobody wants.
	scratchSize = 16 << 10
)

// Options are the particulars of a download. nil and the zero value mean the
// defaults.
type Options struct {
	// Policy says what may be fetched, the redirects included.
	Policy *Policy
	// Client is used instead of that of Policy. URLs and redirects obey Policy
	// even so; addresses, TLS and time limits are its own. Cookies are neither
	// kept nor sent.
	Client *http.Client
	// Header is added to each request, Authorization for example. It is for
	// the origin (scheme, host and port) of the URL only: none of it is sent
	// to another one that a redirect leads to.
	Header http.Header
	// Device, if not nil, is told to the server as Mongoose OS does, also where
	// redirects lead.
	Device *Device

	// MaxSize is the most bytes that a file may have; 0 means any number.
	MaxSize int64
	// Gap is how many bytes between two ranges are rather downloaded in vain
	// than the second one asked for by itself; 0 means DefaultGap, less than 0
	// none.
	Gap int64
	// MaxSkip is how many bytes, already read, are downloaded again in vain if
	// a server sends a whole file instead of the rest; 0 means DefaultMaxSkip,
	// less than 0 none.
	MaxSkip int64

	// RetryFor is how long a download goes on without success, from the first
	// failure or from the last byte before it, in waiting for the server and
	// between attempts; 0 means DefaultRetryFor, less than 0 that nothing is
	// tried again. The delays grow from half a second to half a minute, less
	// up to half of that at random; a longer one that the server asks for
	// (Retry-After) is obeyed, or ends the download. Failures are forgotten
	// when a connection has brought 16 KiB. Open gives up at the third one, a
	// reader at the fifth answer that is not HTTP or ends without a new byte.
	RetryFor time.Duration
	// StallTime and MinRate say when a connection is given up: it brought less
	// than MinRate bytes per second over a StallTime of waiting for it. 0 means
	// DefaultStallTime and DefaultMinRate, a MinRate less than 0 that one byte
	// suffices. Time in which nobody reads does not count. A download that
	// cannot be resumed waits for RetryFor and asks for no rate.
	StallTime time.Duration
	MinRate   int64
	// Retrying, if not nil, is told of each failure after which there is
	// another attempt, and when. It is called by whoever reads, and must
	// neither block nor call the reader.
	Retrying func(err error, wait time.Duration)

	head int64 // headSize, but for tests
}

// complete returns o with the defaults filled in.
func (o *Options) complete() *Options {
	c := Options{}
	if o != nil {
		c = *o
	}
	if c.Policy == nil {
		c.Policy = &Policy{}
	}
	if c.MaxSize <= 0 {
		c.MaxSize = math.MaxInt64
	}
	for _, v := range []struct {
		p   *int64
		def int64
	}{{&c.Gap, DefaultGap}, {&c.MaxSkip, DefaultMaxSkip}, {&c.MinRate, DefaultMinRate}} {
		if *v.p == 0 {
			*v.p = v.def
		}
		*v.p = max(*v.p, 0)
	}
	if c.head == 0 {
		c.head = headSize
	}
	if c.RetryFor == 0 {
		c.RetryFor = DefaultRetryFor
	}
	if c.StallTime <= 0 {
		c.StallTime = DefaultStallTime
	}
	if c.Retrying == nil {
		c.Retrying = func(error, time.Duration) {}
	}
	return &c
}

// File is a file to be read at any place ([File.Ranges]) or from its beginning
// ([File.Stream]), most often a remote one. Its methods may be called from any
// goroutine; the readers that they return are each for one goroutine at a time,
// except for Close.
type File struct {
	name   string // for errors
	size   int64  // -1 if not known
	ranged bool
	src    source

	downloaded, requests, retries atomic.Int64
}

// source is what a File is made of.
type source interface {
	// read returns a reader of rs, which it owns, or of all of the file if rs
	// is nil.
	read(ctx context.Context, rs []ota.Range) (io.ReadCloser, error)
	close() error
}

// Open opens the file at a URL: https, and http and file where the Policy allows
// it. Of a remote file it requests the beginning, which tells its size and
// whether it can be read at any place; ctx is for that only.
//
// Errors are of type [*Error]. They wrap [ErrNotModified] if the server says that
// the device runs it already, a [*StatusError] if it did not give the file,
// [ErrResponse] if what it gave is no HTTP to rely on, [ErrStalled], or one of those
// of [Policy.ParseURL] and [Policy.CheckRedirect].
func Open(ctx context.Context, rawURL string, o *Options) (*File, error) {
	c := o.complete()
	u, err := c.Policy.ParseURL(rawURL)
	if err != nil {
		return nil, err
	}
	if u.Scheme == "file" {
		return openLocal(fileName(u), c.MaxSize)
	}
	return openRemote(ctx, u, c)
}

// OpenFile opens a local file. Errors are of type [*Error].
func OpenFile(name string) (*File, error) { return openLocal(name, math.MaxInt64) }

// NewFile returns r as a File that can be read from its beginning only, and once.
// size is -1 if it is not known; r is not held to it. Close of the File, and of
// the reader, closes r if it is an io.Closer.
func NewFile(r io.Reader, size int64) *File {
	return &File{size: max(size, -1), src: &passed{r: r}}
}

// Size returns the number of bytes of f, -1 if it is not known.
func (f *File) Size() int64 { return f.size }

// Ranged reports whether [File.Ranges] works.
func (f *File) Ranged() bool { return f.ranged }

// Downloaded returns the number of bytes that came over the network so far, the
// ones that nobody asked for included, headers not.
func (f *File) Downloaded() int64 { return f.downloaded.Load() }

// Requests returns the number of requests so far; redirects do not count.
func (f *File) Requests() int64 { return f.requests.Load() }

// Retries returns how many of the requests were made because one before failed.
func (f *File) Retries() int64 { return f.retries.Load() }

// Ranges returns a reader of the given bytes, one range after another. They must
// be in order and must not overlap; ranges that are close to each other are
// requested together. Requests are made as the reader needs them, one at a time,
// and one more shortly before the end of the one before; nothing is held in memory
// but 64 KiB of the beginning and the buffers of two connections. Broken connections are
// resumed.
//
// The error wraps [ErrNoRanges] if f cannot be read this way, and
// [ota.ErrInvalid] if rs is not in order or exceeds the file. Those of Read are
// of type [*Error] too; they wrap [ErrChanged] if the file has changed since it was
// opened and that can be told. The reader gives up when ctx is done, with its
// cause. It must be closed.
func (f *File) Ranges(ctx context.Context, rs []ota.Range) (io.ReadCloser, error) {
	if !f.ranged {
		return nil, &Error{URL: f.name, Err: ErrNoRanges}
	}
	last := int64(0)
	for i, r := range rs {
		if r.Off < last || r.Len <= 0 || r.Len > f.size-r.Off {
			return nil, &Error{URL: f.name, Err: because(ota.ErrInvalid, "range %d: %d bytes at %d, of %d", i, r.Len, r.Off, f.size)}
		}
		last = r.Off + r.Len
	}
	return f.src.read(ctx, append(make([]ota.Range, 0, len(rs)), rs...))
}

// Stream returns a reader of the whole file; see [File.Ranges] for its errors and
// for ctx. It is resumed too, if the server either knows ranges or sends the same
// file again; then it has a size, or a strong validator. The end of a file that
// has neither is wherever the server ends.
func (f *File) Stream(ctx context.Context) (io.ReadCloser, error) {
	return f.src.read(ctx, nil)
}

// Close lets go of what f holds. Readers of a remote file must be closed by
// themselves, and may go on.
func (f *File) Close() error { return f.src.close() }

// wrap returns err as a *Error.
func (f *File) wrap(err error) error {
	if e, ok := err.(*Error); ok {
		return e
	}
	return &Error{URL: f.name, Err: err}
}

// whole returns the range of all bytes.
func (f *File) whole() []ota.Range {
	switch {
	case f.size == 0:
		return nil
	case f.size < 0:
		return []ota.Range{{Off: 0, Len: math.MaxInt64}}
	}
	return []ota.Range{{Off: 0, Len: f.size}}
}

// passed is somebody else's reader.
type passed struct {
	mu   sync.Mutex
	r    io.Reader
	used bool
}

func (p *passed) read(ctx context.Context, _ []ota.Range) (io.ReadCloser, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.used {
		return nil, &Error{Err: because(ErrNoRanges, "a stream can be read once")}
	}
	p.used = true
	return &passedReader{ctx, p.r, p}, nil
}

func (p *passed) close() error {
	p.mu.Lock()
	c, ok := p.r.(io.Closer)
	p.r, p.used = nil, true
	p.mu.Unlock()
	if !ok {
		return nil
	}
	return c.Close()
}

type passedReader struct {
	ctx context.Context
	r   io.Reader
	p   *passed
}

func (r *passedReader) Read(b []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, &Error{Err: context.Cause(r.ctx)}
	}
	return r.r.Read(b)
}

func (r *passedReader) Close() error { return r.p.close() }

// sameOrigin reports whether credentials for one URL may be sent to the other.
func sameOrigin(a, b *url.URL) bool {
	port := func(u *url.URL) string {
		if p := u.Port(); p != "" {
			return p
		}
		return u.Scheme
	}
	p, q := port(a), port(b)
	std := map[string]string{"http": "80", "https": "443"}
	return a.Scheme == b.Scheme && canonical(a.Hostname()) == canonical(b.Hostname()) &&
		(p == q || std[p] == q || std[q] == p)
}

// redirects returns what checks a redirect: the policy, then check. Of a request
// that leaves the origin it removes the headers that are for that only.
func (o *Options) redirects(check func(*http.Request, []*http.Request) error) func(*http.Request, []*http.Request) error {
	return func(r *http.Request, via []*http.Request) error {
		if err := o.Policy.CheckRedirect(r, via); err != nil {
			return err
		}
		if slices.ContainsFunc(append(via[1:len(via):len(via)], r), func(r *http.Request) bool { return !sameOrigin(r.URL, via[0].URL) }) {
			for name := range o.Header {
				r.Header.Del(name)
			}
		}
		if check == nil {
			return nil
		}
		return check(r, via)
	}
}
