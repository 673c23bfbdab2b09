package fetch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

// bench is a server in a bubble, where time is virtual, and a client that reaches
// it under every name.
type bench struct {
	conns  chan net.Conn
	done   chan struct{}
	dialed atomic.Int32
	open   atomic.Int32
	client *http.Client
}

// tracked tells when a connection is closed by the client.
type tracked struct {
	net.Conn
	once sync.Once
	b    *bench
}

func (c *tracked) Close() error {
	c.once.Do(func() { c.b.open.Add(-1) })
	return c.Conn.Close()
}

func (b *bench) Accept() (net.Conn, error) {
	select {
	case c := <-b.conns:
		return c, nil
	case <-b.done:
		return nil, net.ErrClosed
	}
}
func (b *bench) Close() error   { close(b.done); return nil }
func (b *bench) Addr() net.Addr { return &net.UnixAddr{Name: "test"} }

func (b *bench) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	mine, theirs := net.Pipe()
	select {
	case b.conns <- theirs:
	case <-b.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	b.dialed.Add(1)
	b.open.Add(1)
	return &tracked{Conn: mine, b: b}, nil
}

// inBubble runs f with a server. At the end no goroutine and no connection is left.
func inBubble(t *testing.T, h http.HandlerFunc, f func(t *testing.T, b *bench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := &bench{conns: make(chan net.Conn), done: make(chan struct{})}
		tr := &http.Transport{DialContext: b.dial}
		b.client = &http.Client{Transport: tr}
		srv := &http.Server{Handler: h}
		served := make(chan error, 1)
		go func() { served <- srv.Serve(b) }()
		defer func() {
			tr.CloseIdleConnections()
			srv.Close()
			if err := <-served; !t.Failed() {
				require.ErrorIs(t, err, http.ErrServerClosed)
			}
		}()
		f(t, b)
		synctest.Wait()
		tr.CloseIdleConnections()
		synctest.Wait()
		require.Zero(t, b.open.Load(), "connections are left")
	})
}

// testHead is how much Open asks for here, so that small files have something
// beyond it.
const testHead = 300

const testURL = "http://updates.example/fw.zip?token=hidden"

func (b *bench) options(change func(*Options)) *Options {
	o := &Options{Policy: &Policy{AllowHTTP: true}, Client: b.client, head: testHead}
	if change != nil {
		change(o)
	}
	return o
}

// read opens the file and reads rs of it, or all of it if there are none.
func (b *bench) read(t testing.TB, o *Options, rs ...ota.Range) (data []byte, f *File, err error) {
	f, err = Open(context.Background(), testURL, o)
	if err == nil {
		defer func() { require.NoError(t, f.Close()) }()
		var r io.ReadCloser
		if len(rs) > 0 {
			r, err = f.Ranges(context.Background(), rs)
		} else {
			r, err = f.Stream(context.Background())
		}
		if err == nil {
			data, err = io.ReadAll(r)
			if err != nil {
				_, again := r.Read(make([]byte, 1))
				require.Equal(t, err, again)
			}
			require.NoError(t, r.Close())
		}
	}
	if err != nil {
		require.IsType(t, &Error{}, err)
		require.True(t, strings.HasPrefix(err.Error(), `fetch: "`), err)
		require.NotContains(t, err.Error(), "hidden")
		checkText(t, err, "")
	}
	return data, f, err
}

// wares are what a shelf has to offer, and how.
type wares struct {
	data      []byte
	etag      string
	modified  time.Time
	noRanges  bool
	noLength  bool // and thus chunked
	noIfRange bool
}

// shelf is a server whose answers a test spoils.
type shelf struct {
	wares
	mu   sync.Mutex // guards wares while the server runs
	hits atomic.Int32
	// spoil may change the answer to the nth request (from 1), or give it.
	spoil func(n int, w *answering, r *http.Request) (done bool)
}

// answering does something when the byte of the file at off would be sent.
type answering struct {
	http.ResponseWriter
	off  int64 // of the next byte
	at   int64
	then func()
}

func (w *answering) Write(p []byte) (n int, err error) {
	if w.then != nil && w.off <= w.at && w.at < w.off+int64(len(p)) {
		if n, err = w.Write(p[:w.at-w.off]); err != nil {
			return n, err
		}
		_ = http.NewResponseController(w.ResponseWriter).Flush()
		then := w.then
		w.then = nil
		then()
		p = p[n:]
	}
	k, err := w.ResponseWriter.Write(p)
	w.off += int64(k)
	return n + k, err
}

// change changes what later answers are made of.
func (s *shelf) change(f func(*shelf)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s)
}

func (s *shelf) now() wares {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wares
}

// Unwrap lets http.ResponseController through.
func (w *answering) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func abort() { panic(http.ErrAbortHandler) }

func (s *shelf) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	w := &answering{ResponseWriter: rw}
	has := s.now()
	if has.etag != "" {
		w.Header().Set("ETag", has.etag)
	}
	if !has.modified.IsZero() {
		w.Header().Set("Last-Modified", has.modified.UTC().Format(http.TimeFormat))
	}
	if has.noIfRange {
		r.Header.Del("If-Range")
	}
	if s.spoil != nil && s.spoil(int(s.hits.Add(1)), w, r) {
		return
	}
	has = s.now()
	if has.noRanges {
		r.Header.Del("Range")
	}
	if r.Header.Get("Range") == "" {
		if !has.noLength {
			w.Header().Set("Content-Length", strconv.Itoa(len(has.data)))
		}
		_, _ = w.Write(has.data)
		return
	}
	_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &w.off)
	http.ServeContent(&lengthless{w, has.noLength}, r, "", has.modified, bytes.NewReader(has.data))
}

// lengthless sees 200, and perhaps removes the length.
type lengthless struct {
	*answering
	remove bool
}

func (w *lengthless) WriteHeader(code int) {
	if w.remove {
		w.Header().Del("Content-Length")
	}
	if code == http.StatusOK {
		w.off = 0
	}
	w.ResponseWriter.WriteHeader(code)
}

func shelfOf(n int) *shelf { return &shelf{wares: wares{data: content(n), etag: `"one"`}} }

// testRanges are three, of which the last two are requested together, all of them
// behind what Open reads.
func testRanges(n int64) []ota.Range {
	return []ota.Range{{Off: testHead + 3, Len: 100}, {Off: testHead + 300, Len: 50}, {Off: testHead + 360, Len: n - testHead - 360}}
}

const testGap = 20

// A connection that ends at any byte costs a request, and no byte twice.
func TestCut(t *testing.T) {
	const size = testHead + 600
	for _, noLength := range []bool{false, true} {
		for _, mode := range []string{"ranges", "no ranges"} {
			for _, what := range []string{"stream", "ranges"} {
				if what != "stream" && mode != "ranges" {
					continue
				}
				step := int64(1)
				if noLength {
					step = 7
				}
				for k := int64(0); k < size; k += step {
					s := shelfOf(size)
					s.noRanges, s.noLength = mode == "no ranges", noLength
					var cut atomic.Bool
					s.spoil = func(n int, w *answering, r *http.Request) bool {
						if !cut.Load() {
							w.at, w.then = k, func() { cut.Store(true); abort() }
						}
						return false
					}
					inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
						var rs []ota.Range
						want := s.data
						if what == "ranges" {
							rs = testRanges(size)
							want = pick(s.data, rs)
						}
						data, f, err := b.read(t, b.options(func(o *Options) { o.Gap = testGap }), rs...)
						require.NoError(t, err)
						require.True(t, bytes.Equal(want, data))
						retries := int64(0)
						if cut.Load() {
							retries = 1
						}
						require.Equal(t, retries, f.Retries())
						most := int64(size)
						if mode == "no ranges" || k < testHead {
							most += k // Open begins again
						}
						require.LessOrEqual(t, f.Downloaded(), most)
						if noLength && mode == "no ranges" {
							require.EqualValues(t, -1, f.Size())
						} else {
							require.EqualValues(t, size, f.Size())
						}
					})
				}
			}
		}
	}
}

// A connection that stalls at any byte is given up after StallTime.
func TestStall(t *testing.T) {
	const size = testHead + 600
	for k := int64(0); k < size; k++ {
		s := shelfOf(size)
		var stalled atomic.Bool
		s.spoil = func(n int, w *answering, r *http.Request) bool {
			if !stalled.Load() {
				w.at, w.then = k, func() { stalled.Store(true); <-r.Context().Done(); abort() }
			}
			return false
		}
		inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
			start := time.Now()
			var told error
			data, f, err := b.read(t, b.options(func(o *Options) {
				o.Gap = testGap
				o.Retrying = func(err error, d time.Duration) {
					told = err
					require.LessOrEqual(t, d, minDelay)
					require.GreaterOrEqual(t, d, minDelay/2)
				}
			}), testRanges(size)...)
			require.NoError(t, err)
			require.True(t, bytes.Equal(pick(s.data, testRanges(size)), data))
			if !stalled.Load() {
				require.Zero(t, f.Retries())
				return
			}
			require.ErrorIs(t, told, ErrStalled)
			took := time.Since(start)
			require.GreaterOrEqual(t, took, DefaultStallTime+minDelay/2)
			require.LessOrEqual(t, took, DefaultStallTime+minDelay)
		})
	}
}

// The rate counts, not that something comes at all; and only while somebody reads.
func TestMinRate(t *testing.T) {
	const size = testHead + 10_000
	slow := func(perSecond int) *shelf {
		s := shelfOf(size)
		s.spoil = func(n int, w *answering, r *http.Request) bool {
			if n > 1 {
				w.ResponseWriter = &trickle{w.ResponseWriter, perSecond, r.Context()}
			}
			return false
		}
		return s
	}
	s := slow(DefaultMinRate * 2)
	inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
		data, f, err := b.read(t, b.options(nil))
		require.NoError(t, err)
		require.True(t, bytes.Equal(s.data, data))
		require.Zero(t, f.Retries())
	})
	s = slow(DefaultMinRate / 2)
	inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
		start := time.Now()
		_, f, err := b.read(t, b.options(nil))
		require.ErrorIs(t, err, ErrStalled)
		require.EqualValues(t, 4, f.Retries())
		require.Equal(t, DefaultStallTime+DefaultRetryFor, time.Since(start).Round(10*time.Second), "from the first failure on")
		_, f, err = b.read(t, b.options(func(o *Options) { o.MinRate = -1 }))
		require.NoError(t, err)
		require.Zero(t, f.Retries())
	})
	s = shelfOf(size)
	inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
		f, err := Open(t.Context(), testURL, b.options(nil))
		require.NoError(t, err)
		r, err := f.Stream(t.Context())
		require.NoError(t, err)
		var data []byte
		for p := make([]byte, 1000); err == nil; {
			var n int
			n, err = r.Read(p)
			data = append(data, p[:n]...)
			time.Sleep(10 * time.Minute) // slow flash
		}
		require.Equal(t, io.EOF, err)
		require.True(t, bytes.Equal(s.data, data))
		require.Zero(t, f.Retries())
		require.NoError(t, r.Close())
	})
}

// trickle sends so many bytes a second.
type trickle struct {
	http.ResponseWriter
	perSecond int
	ctx       context.Context
}

func (w *trickle) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		select {
		case <-time.After(time.Second):
		case <-w.ctx.Done():
			return n, w.ctx.Err()
		}
		var k int
		k, err = w.ResponseWriter.Write(p[n:min(n+w.perSecond, len(p))])
		n += k
		if err == nil {
			err = http.NewResponseController(w.ResponseWriter).Flush()
		}
	}
	return n, err
}

// A file that is replaced between two requests is noticed, by whatever can tell.
func TestChanged(t *testing.T) {
	const size = testHead + 600
	past := time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC) // a bubble's time begins in 2000
	other := append([]byte("other"), content(size-5)...)
	for name, c := range map[string]struct {
		before func(s *shelf)
		after  func(s *shelf)
		err    error // or nothing, if the change cannot be told
	}{
		"strong tag":              {func(*shelf) {}, func(s *shelf) { s.etag = `"two"` }, ErrChanged},
		"strong tag, no If-Range": {func(s *shelf) { s.noIfRange = true }, func(s *shelf) { s.etag = `"two"` }, ErrChanged},
		"tag made weak":           {func(s *shelf) { s.noIfRange = true }, func(s *shelf) { s.etag = `W/"two"` }, ErrChanged},
		"weak tag":                {func(s *shelf) { s.etag = `W/"one"` }, func(s *shelf) { s.etag = `W/"two"` }, ErrChanged},
		"date":                    {func(s *shelf) { s.etag, s.modified = "", past }, func(s *shelf) { s.modified = past.Add(time.Second) }, ErrChanged},
		"date, no If-Range":       {func(s *shelf) { s.etag, s.modified, s.noIfRange = "", past, true }, func(s *shelf) { s.modified = past.Add(time.Second) }, ErrChanged},
		"date of now":             {func(s *shelf) { s.etag, s.modified = "", time.Now() }, func(s *shelf) { s.modified = time.Now().Add(time.Second) }, ErrChanged},
		"size":                    {func(s *shelf) { s.etag = "" }, func(s *shelf) { s.data = append(other, 0) }, ErrChanged},
		"much smaller":            {func(s *shelf) { s.etag = "" }, func(s *shelf) { s.data = []byte("x") }, ErrChanged}, // 416
		"tag, no ranges":          {func(s *shelf) { s.noRanges = true }, func(s *shelf) { s.etag = `"two"` }, ErrChanged},
		"size, no ranges":         {func(s *shelf) { s.noRanges, s.etag = true, "" }, func(s *shelf) { s.data = append(other, 0) }, ErrChanged},
		"no ranges any more":      {func(s *shelf) {}, func(s *shelf) { s.noRanges, s.etag = true, "" }, ErrNoRanges},
		"unknown size":            {func(s *shelf) { s.noRanges, s.noLength = true, true }, func(s *shelf) { s.etag = `"two"` }, ErrChanged},
		"only the tag gone":       {func(s *shelf) { s.noIfRange = true }, func(s *shelf) { s.etag = "" }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			for _, k := range []int64{testHead + 1, testHead + 103, testHead + 104, testHead + 299, testHead + 300, testHead + 301, size - 1} {
				s := shelfOf(size)
				c.before(s)
				var changed atomic.Bool
				s.spoil = func(n int, w *answering, r *http.Request) bool {
					if !changed.Load() {
						w.at, w.then = k, func() {
							changed.Store(true)
							s.change(c.after)
							abort()
						}
					}
					return false
				}
				inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
					want := s.data
					data, f, err := b.read(t, b.options(nil))
					require.True(t, changed.Load())
					require.True(t, bytes.HasPrefix(want, data), "no byte of anything else")
					require.EqualValues(t, 1, f.Retries())
					if c.err == nil {
						require.NoError(t, err)
						require.True(t, bytes.Equal(want, data))
						return
					}
					require.ErrorIs(t, err, c.err)
					if c.err == ErrChanged {
						require.ErrorIs(t, err, ota.ErrChanged)
					}
				})
			}
		})
	}
	// Between ranges, without a failure.
	s := shelfOf(size)
	s.spoil = func(n int, w *answering, r *http.Request) bool {
		if n == 3 {
			require.Equal(t, `"one"`, r.Header.Get("If-Range"))
			w.Header().Set("ETag", `"two"`)
		}
		return false
	}
	inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
		rs := testRanges(size)
		data, f, err := b.read(t, b.options(func(o *Options) { o.Gap = testGap }), rs...)
		require.ErrorIs(t, err, ErrChanged)
		require.Equal(t, pick(s.data, rs[:1]), data)
		require.Zero(t, f.Retries())
	})
	// 304 is for the first request only.
	s = shelfOf(size)
	s.spoil = func(n int, w *answering, r *http.Request) bool {
		if n > 1 {
			w.WriteHeader(http.StatusNotModified)
		}
		return n > 1
	}
	inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
		_, _, err := b.read(t, b.options(nil))
		require.ErrorIs(t, err, ErrChanged)
	})
}

// Weak validators are not sent.
func TestIfRange(t *testing.T) {
	past := time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		etag     string
		modified time.Time
		want     string
	}{
		{`"x"`, past, `"x"`},
		{`""`, past, `""`},
		{`W/"x"`, past, ""},
		{`x`, past, ""},
		{`"`, time.Time{}, ""},
		{"", past, "Fri, 01 Jan 1999 00:00:00 GMT"},
		{"", time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC), ""}, // may change within this second
		{"", time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC), ""},
		{"", time.Time{}, ""},
	} {
		s := shelfOf(testHead + 10)
		s.etag, s.modified, s.noIfRange = c.etag, c.modified, true
		var got []string
		inBubble(t, func(w http.ResponseWriter, r *http.Request) {
			got = append(got, r.Header.Get("If-Range"))
			s.ServeHTTP(w, r)
		}, func(t *testing.T, b *bench) {
			_, _, err := b.read(t, b.options(nil))
			require.NoError(t, err)
			require.Equal(t, []string{"", c.want}, got)
		})
	}
}

// Servers that send all of it though asked for a part.
func TestWholeInsteadOfPart(t *testing.T) {
	const size = testHead + 30_000
	s := shelfOf(size)
	s.noRanges = true
	inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
		data, f, err := b.read(t, b.options(nil))
		require.NoError(t, err)
		require.True(t, bytes.Equal(s.data, data))
		require.EqualValues(t, 1, f.Requests())
		require.EqualValues(t, size, f.Size())
		require.False(t, f.Ranged())
		_, _, err = b.read(t, b.options(nil), ota.Range{Off: 0, Len: 1})
		require.ErrorIs(t, err, ErrNoRanges)
		require.ErrorIs(t, err, ota.ErrUnsupported)
		// Read twice.
		f, err = Open(t.Context(), testURL, b.options(nil))
		require.NoError(t, err)
		for range 2 {
			r, err := f.Stream(t.Context())
			require.NoError(t, err)
			data, err = io.ReadAll(r)
			require.NoError(t, err)
			require.True(t, bytes.Equal(s.data, data))
			require.NoError(t, r.Close())
		}
		require.NoError(t, f.Close())
		// Opened and never read.
		f, err = Open(t.Context(), testURL, b.options(nil))
		require.NoError(t, err)
		require.NoError(t, f.Close())
	})
	// Ranges that stop working.
	rs := []ota.Range{{Off: 100, Len: 50}, {Off: testHead + 10_000, Len: 20}, {Off: testHead + 29_000, Len: 5}}
	for etag, ok := range map[string]bool{`"one"`: true, "": true, `W/"one"`: true} {
		s = shelfOf(size)
		s.etag = etag
		s.spoil = func(n int, w *answering, r *http.Request) bool {
			s.change(func(s *shelf) { s.noRanges = n > 1 })
			return false
		}
		inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
			data, f, err := b.read(t, b.options(nil), rs...)
			require.Equal(t, ok, err == nil, "%v", err)
			require.Equal(t, pick(s.data, rs), data)
			require.EqualValues(t, 2, f.Requests(), "one is enough for both")
			require.LessOrEqual(t, f.Downloaded(), int64(testHead+size))
			for skip, ok := range map[int64]bool{testHead + 10_000: true, testHead + 9_999: false, -1: false} {
				s.hits.Store(0)
				_, _, err = b.read(t, b.options(func(o *Options) { o.MaxSkip = skip }), rs[:2]...)
				require.Equal(t, ok, err == nil, "%v", err)
				if !ok {
					require.ErrorIs(t, err, ErrNoRanges)
				}
			}
		})
	}
}

// raw answers with a text instead of HTTP as net/http makes it.
func raw(t testing.TB, w http.ResponseWriter, text string) {
	c, buf, err := http.NewResponseController(w).Hijack()
	require.NoError(t, err)
	_, _ = buf.WriteString(text)
	_ = buf.Flush()
	c.Close()
}

// Answers that no server should give are refused at once, whether to the first
// request or to a later one.
func TestBadAnswers(t *testing.T) {
	const size = testHead + 600
	rest := strings.Repeat("hidden", 200)
	part := func(first int64, header string) string {
		return fmt.Sprintf("HTTP/1.1 206 Partial Content\r\nETag: \"one\"\r\n"+header+"\r\n\r\n", first) + rest
	}
	numbers := strings.NewReplacer("LAST", strconv.Itoa(testHead-1), "SIZE", strconv.Itoa(size))
	for name, answer := range map[string]string{
		"no Content-Range":       "X: %d",
		"bad Content-Range":      "Content-Range: bytes %d-hidden/SIZE",
		"other unit":             "Content-Range: lines %d-LAST/SIZE",
		"two Content-Ranges":     "Content-Range: bytes %[1]d-LAST/SIZE\r\nContent-Range: bytes %[1]d-LAST/SIZE",
		"other place":            "Content-Range: bytes 1%d-999999/1000000",
		"more than asked for":    "Content-Range: bytes %d-999999/1000000",
		"beyond the end":         "Content-Range: bytes %d-LAST/500",
		"unsatisfied":            "Content-Range: bytes */SIZE\r\nX: %d",
		"multipart":              "Content-Type: multipart/byteranges; boundary=b\r\nX: %d",
		"wrong length":           "Content-Range: bytes %d-%[1]d/SIZE\r\nContent-Length: 2",
		"compressed":             "Content-Range: bytes %d-%[1]d/SIZE\r\nContent-Encoding: gzip",
		"compressed twice":       "Content-Range: bytes %d-%[1]d/SIZE\r\nContent-Encoding: identity\r\nContent-Encoding: br",
		"compressed, all of it":  "\x00HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: SIZE\r\n\r\n",
		"too much":               "Content-Range: bytes %d-%[1]d/SIZE\r\nConnection: close",
		"too much, in chunks":    "\x00HTTP/1.1 206 Partial Content\r\nContent-Range: bytes %d-%[1]d/SIZE\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
		"a number out of bounds": "Content-Range: bytes %d-99999999999999999999/99999999999999999999",
	} {
		answer = numbers.Replace(answer)
		for _, nth := range []int{1, 2} {
			s := shelfOf(size)
			s.spoil = func(n int, w *answering, r *http.Request) bool {
				if n != nth {
					return false
				}
				var first int64
				if n > 1 {
					first = testHead
				}
				text, whole := strings.CutPrefix(answer, "\x00")
				if whole && strings.Contains(text, "%") {
					text = fmt.Sprintf(text, first)
				} else if !whole {
					text = part(first, text)
				}
				raw(t, w, text)
				return true
			}
			inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
				data, _, err := b.read(t, b.options(nil))
				require.ErrorIs(t, err, ErrResponse, name)
				require.EqualValues(t, nth, s.hits.Load(), "%s: it was tried again", name)
				require.LessOrEqual(t, len(data), testHead+1)
			})
		}
	}
	// A part that nobody asked for.
	s := shelfOf(100)
	s.noRanges, s.noLength = true, true
	s.spoil = func(n int, w *answering, r *http.Request) bool {
		if n == 1 {
			w.at, w.then = 0, abort
			return false
		}
		raw(t, w, part(0, "Content-Range: bytes %d-99/100"))
		return true
	}
	inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
		f, err := Open(t.Context(), testURL, b.options(nil))
		require.NoError(t, err)
		r, err := f.Stream(t.Context())
		require.NoError(t, err)
		_, err = io.ReadAll(r)
		require.ErrorIs(t, err, ErrResponse)
		require.NoError(t, r.Close())
	})
}

// Servers that send parts of the parts.
func TestSmallParts(t *testing.T) {
	const size = testHead + 200_000
	for most, ok := range map[int64]bool{1: false, 1000: false, recovered: true, 50_000: true} {
		s := shelfOf(size)
		s.spoil = func(n int, w *answering, r *http.Request) bool {
			var first, last int64
			k, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last)
			require.Equal(t, 2, k, "%v", err)
			r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", first, min(last, first+most-1)))
			return false
		}
		inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
			data, f, err := b.read(t, b.options(nil))
			require.Equal(t, ok, err == nil, "%v", err)
			if ok {
				require.True(t, bytes.Equal(s.data, data))
				require.Zero(t, f.Retries())
			} else {
				require.ErrorIs(t, err, io.ErrUnexpectedEOF)
				require.Less(t, f.Requests(), int64(30))
			}
		})
	}
}

// What the server says about itself decides whether it is asked again, and when.
func TestStatus(t *testing.T) {
	for code, again := range map[int]bool{
		204: false, 300: false, 305: false, 400: false, 401: false, 403: false, 404: false, 405: false, 410: false, 416: false,
		451: false, 501: false, 505: false, 408: true, 425: true, 429: true, 500: true, 502: true, 503: true, 504: true, 599: true,
	} {
		for _, nth := range []int{1, 2} {
			s := shelfOf(testHead + 10)
			s.spoil = func(n int, w *answering, _ *http.Request) bool {
				if n == nth {
					w.WriteHeader(code)
				}
				return n == nth
			}
			inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
				data, f, err := b.read(t, b.options(nil))
				if again {
					require.NoError(t, err)
					require.True(t, bytes.Equal(s.data, data))
					require.EqualValues(t, 1, f.Retries())
					return
				}
				require.EqualValues(t, nth, s.hits.Load())
				if code == 416 && nth == 2 {
					require.ErrorIs(t, err, ErrChanged)
					return
				}
				var e *StatusError
				require.ErrorAs(t, err, &e)
				require.Equal(t, code, e.Code)
				require.ErrorContains(t, err, "the server answered "+strconv.Itoa(code))
			})
		}
	}
}

func TestRetryAfter(t *testing.T) {
	for value, want := range map[string]time.Duration{
		"45":                            45 * time.Second,
		"Sat, 01 Jan 2000 00:01:00 GMT": time.Minute,
		"Fri, 31 Dec 1999 00:00:00 GMT": 0,
		"soon":                          0,
		"-5":                            0,
		"":                              0,
	} {
		s := shelfOf(testHead + 10)
		s.spoil = func(n int, w *answering, _ *http.Request) bool {
			if n == 2 {
				w.Header().Set("Retry-After", value)
				w.WriteHeader(503)
			}
			return n == 2
		}
		inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
			start := time.Now()
			_, _, err := b.read(t, b.options(nil))
			require.NoError(t, err)
			took := time.Since(start)
			if want == 0 {
				require.LessOrEqual(t, took, minDelay)
				require.GreaterOrEqual(t, took, minDelay/2)
			} else {
				require.Equal(t, want, took)
			}
		})
	}
	for _, value := range []string{"121", "99999999999", "Sat, 01 Jan 2022 00:01:00 GMT"} {
		s := shelfOf(10)
		s.spoil = func(n int, w *answering, _ *http.Request) bool {
			w.Header().Set("Retry-After", value)
			w.WriteHeader(429)
			return true
		}
		inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
			start := time.Now()
			_, _, err := b.read(t, b.options(nil))
			var e *StatusError
			require.ErrorAs(t, err, &e)
			require.Greater(t, e.RetryAfter, 2*time.Minute, "for whoever plans the next attempt")
			require.Equal(t, start, time.Now())
			require.EqualValues(t, 1, s.hits.Load())
		})
	}
}

// Nothing is tried for ever.
func TestGivesUp(t *testing.T) {
	const size = testHead + 100_000
	for name, c := range map[string]struct {
		spoil  func(n int, w *answering)
		tries  int // the first one included; 0 if RetryFor decides
		err    error
		change func(*Options)
	}{
		"cut":            {func(n int, w *answering) { w.at, w.then = testHead, abort }, 1 + vagueAttempts, io.ErrUnexpectedEOF, nil},
		"one byte each":  {func(n int, w *answering) { w.at, w.then = max(w.off, testHead+int64(n)-1), abort }, 0, io.ErrUnexpectedEOF, nil},
		"a KiB each":     {func(n int, w *answering) { w.at, w.then = max(w.off, testHead+1024*int64(n)), abort }, 0, io.ErrUnexpectedEOF, nil},
		"no retries":     {func(n int, w *answering) { w.at, w.then = testHead, abort }, 2, io.ErrUnexpectedEOF, func(o *Options) { o.RetryFor = -1 }},
		"unavailable":    {func(n int, w *answering) { w.WriteHeader(503); abort() }, 0, nil, nil},
		"at once":        {func(n int, w *answering) { abort() }, 0, io.EOF, nil},
		"not understood": {func(n int, w *answering) { raw(t, w, "hidden\r\n\r\n"); abort() }, 1 + vagueAttempts, ErrResponse, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := shelfOf(size)
			s.spoil = func(n int, w *answering, _ *http.Request) bool {
				if n > 1 {
					c.spoil(n, w)
				}
				return false
			}
			inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
				start := time.Now()
				_, _, err := b.read(t, b.options(c.change))
				require.Error(t, err)
				if c.err != nil {
					require.ErrorIs(t, err, c.err)
				}
				require.LessOrEqual(t, time.Since(start), DefaultRetryFor)
				if c.tries > 0 {
					require.EqualValues(t, c.tries, s.hits.Load())
				} else {
					require.Greater(t, time.Since(start), DefaultRetryFor/2)
					require.Greater(t, s.hits.Load(), int32(5))
					require.Less(t, s.hits.Load(), int32(25))
				}
			})
		})
	}
	// Failures with progress in between do not add up.
	s := shelfOf(50 * recovered)
	s.spoil = func(n int, w *answering, _ *http.Request) bool {
		w.at, w.then = recovered*int64(n), abort
		return false
	}
	inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
		start := time.Now()
		data, f, err := b.read(t, b.options(func(o *Options) { o.RetryFor = 2 * time.Second }))
		require.NoError(t, err)
		require.True(t, bytes.Equal(s.data, data))
		require.Greater(t, f.Retries(), int64(20))
		require.LessOrEqual(t, time.Since(start), time.Duration(f.Retries())*minDelay)
	})
	// Open is less patient.
	s = shelfOf(10)
	s.spoil = func(n int, w *answering, _ *http.Request) bool { w.WriteHeader(500); return true }
	inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
		start := time.Now()
		_, _, err := b.read(t, b.options(nil))
		require.ErrorContains(t, err, "500 Internal Server Error (attempt 3)")
		require.EqualValues(t, openAttempts, s.hits.Load())
		require.LessOrEqual(t, time.Since(start), 3*minDelay)
	})
	// No answer at all.
	inBubble(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, func(t *testing.T, b *bench) {
		start := time.Now()
		_, _, err := b.read(t, b.options(func(o *Options) { o.RetryFor = 10 * time.Second }))
		require.ErrorIs(t, err, ErrStalled)
		require.Equal(t, 10*time.Second, time.Since(start))
	})
}

// A file of unknown size is resumed only if it can be recognised.
func TestUnknownSize(t *testing.T) {
	const size = 150_000
	for etag, ok := range map[string]bool{`"one"`: true, `W/"one"`: false, "": false} {
		for _, ranges := range []bool{false, true} {
			s := shelfOf(size)
			s.etag, s.noLength = etag, true
			s.spoil = func(n int, w *answering, r *http.Request) bool {
				s.change(func(s *shelf) { s.noRanges = !ranges || n == 1 })
				if n == 1 {
					w.at, w.then = 20_000, abort
				}
				return false
			}
			inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
				data, f, err := b.read(t, b.options(nil))
				require.EqualValues(t, -1, f.Size())
				if !ok {
					require.ErrorIs(t, err, io.ErrUnexpectedEOF)
					require.Len(t, data, 20_000)
					require.EqualValues(t, 1, f.Requests())
					return
				}
				require.NoError(t, err)
				require.True(t, bytes.Equal(s.data, data))
				require.EqualValues(t, 2, f.Requests())
			})
		}
	}
	// A server that knows ranges, but no size.
	s := shelfOf(size)
	s.spoil = func(n int, w *answering, r *http.Request) bool {
		if r.Header.Get("Range") != "" {
			raw(t, w, fmt.Sprintf("HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-%d/*\r\n\r\n%s", testHead-1, s.data[:testHead]))
			return true
		}
		return false
	}
	inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
		data, f, err := b.read(t, b.options(nil))
		require.NoError(t, err)
		require.True(t, bytes.Equal(s.data, data))
		require.False(t, f.Ranged())
	})
}

func TestMaxSize(t *testing.T) {
	const size = 50_000
	for limit, ok := range map[int64]bool{size: true, size - 1: false, 1: false} {
		for _, change := range []func(*shelf){
			func(*shelf) {},
			func(s *shelf) { s.noRanges = true },
			func(s *shelf) { s.noRanges, s.noLength = true, true },
		} {
			s := shelfOf(size)
			change(s)
			inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
				data, _, err := b.read(t, b.options(func(o *Options) { o.MaxSize = limit }))
				if ok {
					require.NoError(t, err)
					require.True(t, bytes.Equal(s.data, data))
				} else {
					require.ErrorIs(t, err, ErrTooLarge)
					require.ErrorIs(t, err, ota.ErrTooLarge)
				}
			})
		}
	}
	// Empty.
	for _, noRanges := range []bool{false, true} {
		s := shelfOf(0)
		s.noRanges = noRanges
		inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
			data, _, err := b.read(t, b.options(nil))
			require.Empty(t, data)
			require.NoError(t, err)
		})
	}
}

// After a redirect requests go to where it led, until that fails.
func TestRedirected(t *testing.T) {
	const size = testHead + 1000
	s := shelfOf(size)
	var hosts []string
	var mu sync.Mutex
	mirror := 1
	down := false
	inBubble(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		hosts = append(hosts, r.Host)
		m := mirror
		mu.Unlock()
		for _, h := range []string{"Authorization", "X-Token", "Cookie"} {
			require.Equal(t, r.Host == "updates.example" && h != "Cookie", r.Header.Get(h) != "", "%s to %s", h, r.Host)
		}
		require.Equal(t, "d", r.Header.Get("X-MGOS-Device-ID"))
		require.Empty(t, r.Header.Get("Referer"))
		switch r.Host {
		case "updates.example":
			w.Header().Set("Set-Cookie", "a=b")
			http.Redirect(w, r, fmt.Sprintf("http://mirror%d.example/%s", m, r.URL.Path), http.StatusFound)
		case "mirror1.example":
			if down {
				w.WriteHeader(http.StatusNotFound)
				return
			}
			fallthrough
		default:
			s.ServeHTTP(w, r)
		}
	}, func(t *testing.T, b *bench) {
		o := b.options(func(o *Options) {
			o.Header = http.Header{"Authorization": {"Bearer hidden"}, "X-Token": {"hidden"}}
			o.Device = &Device{ID: "d"} // its MAC is empty
			o.Gap = testGap
			c := *b.client
			c.Jar = jar{}
			o.Client = &c
		})
		f, err := Open(t.Context(), testURL, o)
		require.NoError(t, err)
		rs := testRanges(size)
		for i, want := range []string{
			"mirror1.example",
			"mirror1.example updates.example mirror2.example", // as the first is down
			"mirror2.example",
		} {
			mu.Lock()
			hosts = nil
			if i == 1 {
				mirror, down = 2, true
			}
			mu.Unlock()
			r, err := f.Ranges(t.Context(), rs[:1])
			require.NoError(t, err)
			data, err := io.ReadAll(r)
			require.NoError(t, err)
			require.Equal(t, pick(s.data, rs[:1]), data)
			require.NoError(t, r.Close())
			require.Equal(t, want, strings.Join(hosts, " "))
		}
		require.Zero(t, f.Retries())
		require.NoError(t, f.Close())
	})
	for location, want := range map[string][]error{
		"file:///etc/passwd":      {ErrRedirect, ErrPolicy},
		"http://127.0.0.1/":       {ErrRedirect, ErrAddress},
		"http://[::1]/":           {ErrRedirect, ErrAddress},
		"http://169.254.169.254/": {ErrRedirect, ErrAddress},
		"/again":                  {ErrRedirect},
	} {
		n := 0
		inBubble(t, func(w http.ResponseWriter, r *http.Request) {
			n++
			http.Redirect(w, r, location, http.StatusFound)
		}, func(t *testing.T, b *bench) {
			_, _, err := b.read(t, b.options(func(o *Options) { o.Policy.AllowFile = true }))
			for _, is := range want {
				require.ErrorIs(t, err, is)
			}
			require.LessOrEqual(t, n, 1+DefaultMaxRedirects, "and not again")
		})
	}
}

// jar is full of cookies.
type jar struct{}

func (jar) SetCookies(*url.URL, []*http.Cookie) {}
func (jar) Cookies(*url.URL) []*http.Cookie     { return []*http.Cookie{{Name: "a", Value: "b"}} }

func TestSameOrigin(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"https://h/a", "https://H.:443/b?c", true},
		{"http://h:80", "http://h", true},
		{"http://h:443", "https://h", false},
		{"https://h:80", "https://h", false},
		{"https://h", "https://h:8443", false},
		{"https://h", "https://www.h", false},
		{"https://[::1]:443", "https://[0:0::1]", true},
	} {
		a, err := url.Parse(c.a)
		require.NoError(t, err)
		b, err := url.Parse(c.b)
		require.NoError(t, err)
		require.Equal(t, c.want, sameOrigin(a, b), c)
		require.Equal(t, c.want, sameOrigin(b, a), c)
	}
}

// Whatever a reader waits for, it stops when told.
func TestCancel(t *testing.T) {
	const size = testHead + 1000
	boom := errors.New("boom")
	wait := func(_ int, w *answering, r *http.Request) bool { <-r.Context().Done(); return true }
	for name, spoil := range map[string]func(int, *answering, *http.Request) bool{
		"answer": wait,
		"body": func(n int, w *answering, r *http.Request) bool {
			w.at, w.then = testHead+10, func() { <-r.Context().Done(); abort() }
			return false
		},
		"next attempt": func(n int, w *answering, r *http.Request) bool { w.WriteHeader(503); return true },
	} {
		s := shelfOf(size)
		s.spoil = func(n int, w *answering, r *http.Request) bool { return n > 1 && spoil(n, w, r) }
		for how, want := range map[string]error{"cancel": boom, "deadline": context.DeadlineExceeded, "close": fs.ErrClosed} {
			s.hits.Store(0)
			inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
				f, err := Open(t.Context(), testURL, b.options(nil))
				require.NoError(t, err)
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				if how == "deadline" {
					var stop context.CancelFunc
					ctx, stop = context.WithTimeout(ctx, 100*time.Millisecond)
					defer stop()
				}
				r, err := f.Stream(ctx)
				require.NoError(t, err)
				got := make(chan error)
				go func() {
					_, err := io.Copy(io.Discard, r)
					got <- err
				}()
				time.Sleep(100 * time.Millisecond)
				switch how {
				case "cancel":
					cancel(boom)
				case "close":
					require.NoError(t, r.Close())
				}
				start := time.Now()
				require.ErrorIs(t, <-got, want, name)
				require.Equal(t, start, time.Now())
				require.NoError(t, r.Close())
				require.NoError(t, r.Close())
				require.NoError(t, f.Close())
			})
		}
	}
	// Open, too; afterwards its context does not matter.
	for _, noRanges := range []bool{false, true} {
		s := shelfOf(size)
		s.noRanges = noRanges
		var mute atomic.Bool
		s.spoil = func(n int, w *answering, r *http.Request) bool { return mute.Load() && wait(n, w, r) }
		inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
			ctx, cancel := context.WithCancelCause(t.Context())
			f, err := Open(ctx, testURL, b.options(nil))
			require.NoError(t, err)
			cancel(boom)
			r, err := f.Stream(t.Context())
			require.NoError(t, err)
			data, err := io.ReadAll(r)
			require.NoError(t, err)
			require.True(t, bytes.Equal(s.data, data))
			require.NoError(t, r.Close())
			_, err = Open(ctx, testURL, b.options(nil))
			require.ErrorIs(t, err, boom)
			mute.Store(true)
			start := time.Now()
			ctx, stop := context.WithTimeout(t.Context(), time.Second)
			defer stop()
			_, err = Open(ctx, testURL, b.options(nil))
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.Equal(t, time.Second, time.Since(start))
		})
	}
}

// The next request is made before the answer to the last one is read, so that its
// latency is hidden; connections are kept.
func TestReadAhead(t *testing.T) {
	const n, latency, reading = 50, 100 * time.Millisecond, 90 * time.Millisecond
	s := shelfOf(testHead + n*1000)
	s.spoil = func(k int, w *answering, r *http.Request) bool {
		if k > 1 {
			select {
			case <-time.After(latency):
			case <-r.Context().Done():
			}
		}
		return false
	}
	inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
		var rs []ota.Range
		for i := range int64(n) {
			rs = append(rs, ota.Range{Off: testHead + 1000*i + i%7, Len: 500})
		}
		f, err := Open(t.Context(), testURL, b.options(func(o *Options) { o.Gap = -1 }))
		require.NoError(t, err)
		r, err := f.Ranges(t.Context(), rs)
		require.NoError(t, err)
		start := time.Now()
		var data []byte
		for {
			p := make([]byte, 500)
			k, err := io.ReadFull(r, p)
			data = append(data, p[:k]...)
			if err != nil {
				require.Equal(t, io.EOF, err)
				break
			}
			time.Sleep(reading) // and writing
		}
		require.Equal(t, pick(s.data, rs), data)
		require.LessOrEqual(t, time.Since(start), n*latency+2*latency, "as opposed to n*(latency+reading)")
		require.EqualValues(t, n+1, f.Requests())
		require.EqualValues(t, testHead+n*500, f.Downloaded(), "not a byte too many")
		require.LessOrEqual(t, b.dialed.Load(), int32(2))
		require.NoError(t, r.Close())
		// Given up in the middle, with a request under way.
		r, err = f.Ranges(t.Context(), rs)
		require.NoError(t, err)
		_, err = io.ReadFull(r, make([]byte, 250))
		require.NoError(t, err)
		require.NoError(t, r.Close())
		require.NoError(t, f.Close())
	})
}

// One request for ranges that are close, and what lies between them is counted.
func TestGap(t *testing.T) {
	const size = testHead + 60_000
	rs := []ota.Range{{Off: testHead, Len: 10}, {Off: testHead + 30, Len: 10}, {Off: testHead + 61, Len: 10}, {Off: size - 1, Len: 1}}
	for gap, want := range map[int64][]string{
		-1: {"300-309", "330-339", "361-370", "60299-60299"},
		20: {"300-339", "361-370", "60299-60299"},
		0:  {"300-370", "60299-60299"}, // the default
	} {
		s := shelfOf(size)
		var got []string
		s.spoil = func(n int, w *answering, r *http.Request) bool {
			if n > 1 {
				got = append(got, strings.TrimPrefix(r.Header.Get("Range"), "bytes="))
			}
			return false
		}
		inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
			data, f, err := b.read(t, b.options(func(o *Options) { o.Gap = gap }), rs...)
			require.NoError(t, err)
			require.Equal(t, pick(s.data, rs), data)
			require.Equal(t, want, got)
			sum := int64(testHead)
			for _, g := range got {
				var a, b int64
				_, err := fmt.Sscanf(g, "%d-%d", &a, &b)
				require.NoError(t, err)
				sum += b - a + 1
			}
			require.Equal(t, sum, f.Downloaded())
		})
	}
}

func TestRangesInvalid(t *testing.T) {
	s := shelfOf(1000)
	inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
		f, err := Open(t.Context(), testURL, b.options(nil))
		require.NoError(t, err)
		for _, rs := range [][]ota.Range{
			{{Off: -1, Len: 5}}, {{Off: 5, Len: 0}}, {{Off: 5, Len: -1}}, {{Off: 0, Len: 1001}}, {{Off: 1000, Len: 1}},
			{{Off: 10, Len: 5}, {Off: 14, Len: 5}}, {{Off: 10, Len: 5}, {Off: 0, Len: 5}},
			{{Off: 1, Len: 1<<63 - 1}}, {{Off: 1<<63 - 1, Len: 1<<63 - 1}},
		} {
			_, err := f.Ranges(t.Context(), rs)
			require.ErrorIs(t, err, ota.ErrInvalid)
		}
		for _, rs := range [][]ota.Range{nil, {}} {
			r, err := f.Ranges(t.Context(), rs)
			require.NoError(t, err)
			data, err := io.ReadAll(r)
			require.NoError(t, err)
			require.Empty(t, data)
			require.NoError(t, r.Close())
		}
		require.NoError(t, f.Close())
		require.EqualValues(t, 1, f.Requests())
	})
}

// Random ranges from a server that fails at random are still the right bytes.
func TestRandomFaults(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	var failures int64
	for range 300 {
		s := shelfOf(100_000)
		s.noLength = rnd.IntN(2) == 0
		var mu sync.Mutex
		s.spoil = func(n int, w *answering, r *http.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			at := int64(rnd.IntN(100_000))
			switch rnd.IntN(8) {
			case 0:
				w.WriteHeader(503)
				return true
			case 1:
				abort()
			case 2:
				w.at, w.then = at, abort
			case 3:
				w.at, w.then = at, func() { <-r.Context().Done(); abort() }
			case 4:
				r.Header.Del("Range") // all of it
			case 5: // a part of it
				var first, last int64
				_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last)
				r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", first, min(last, first+at)))
			}
			return false
		}
		rs := randomRanges(rnd, 100_000)
		gap := rnd.Int64N(10_000) - 1
		inBubble(t, s.ServeHTTP, func(t *testing.T, b *bench) {
			var f *File
			var err error
			o := b.options(func(o *Options) { o.Gap, o.RetryFor = gap, time.Hour })
			for f == nil || !f.Ranged() {
				if f != nil {
					require.NoError(t, f.Close())
				}
				if f, err = Open(t.Context(), testURL, o); err != nil {
					f = nil // three bad ones in a row
				}
			}
			r, err := f.Ranges(t.Context(), rs)
			require.NoError(t, err)
			data, err := io.ReadAll(r)
			require.NoError(t, r.Close())
			require.NoError(t, f.Close())
			want := pick(s.data, rs)
			if err != nil { // five in a row without a byte
				require.ErrorContains(t, err, "(attempt")
				want = want[:len(data)]
			}
			require.True(t, bytes.Equal(want, data))
			mu.Lock()
			failures += f.Retries()
			mu.Unlock()
		})
	}
	require.Greater(t, failures, int64(300))
}
