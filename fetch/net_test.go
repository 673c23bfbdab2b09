package fetch

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

// HTTP/2 does not fill the memory with what nobody reads.
func TestHTTP2(t *testing.T) {
	data := content(8 << 20)
	var sent atomic.Int64
	inBubble(t, nil, func(t *testing.T, b *bench) {
		var h2 http.Protocols
		h2.SetUnencryptedHTTP2(true)
		srv := &http.Server{Protocols: &h2, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			require.Equal(t, 2, r.ProtoMajor)
			w.Header().Set("ETag", `"x"`)
			http.ServeContent(&counter{w, &sent}, r, "", time.Time{}, bytes.NewReader(data))
		})}
		other := &bench{conns: make(chan net.Conn), done: make(chan struct{})}
		served := make(chan error, 1)
		go func() { served <- srv.Serve(other) }()
		defer func() { srv.Close(); <-served }()

		p := &Policy{AllowHTTP: true}
		c := p.Client()
		tr := c.Transport.(*transport).t
		tr.DialContext, tr.Protocols = other.dial, &h2
		defer c.CloseIdleConnections()
		f, err := Open(t.Context(), testURL, &Options{Policy: p, Client: c})
		require.NoError(t, err)
		r, err := f.Stream(t.Context())
		require.NoError(t, err)
		got := make([]byte, len(data))
		_, err = io.ReadFull(r, got[:headSize+1])
		require.NoError(t, err)
		synctest.Wait()
		require.Greater(t, sent.Load(), int64(headSize+streamBuffer/2))
		require.Less(t, sent.Load(), int64(headSize+streamBuffer+(64<<10)))
		_, err = io.ReadFull(r, got[headSize+1:])
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, got))
		require.NoError(t, r.Close())
		require.NoError(t, f.Close())
	})
}

// The policy's own client speaks HTTP/2 and TLS.
func TestOpenTLS(t *testing.T) {
	data := content(200_000)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		require.Equal(t, 2, r.ProtoMajor)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	srv.EnableHTTP2 = true
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // it will be told that its certificate is bad
	srv.StartTLS()
	defer srv.Close()
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	f, err := Open(t.Context(), srv.URL, &Options{Policy: &Policy{AllowLoopback: true, TLS: &tls.Config{RootCAs: roots}}})
	require.NoError(t, err)
	r, err := f.Stream(t.Context())
	require.NoError(t, err)
	got, err := io.ReadAll(r)
	require.NoError(t, err)
	require.True(t, bytes.Equal(data, got))
	require.NoError(t, r.Close())
	require.NoError(t, f.Close())
	tries := 0
	_, err = Open(t.Context(), srv.URL, &Options{Policy: &Policy{AllowLoopback: true}, Retrying: func(error, time.Duration) { tries++ }})
	var cert *tls.CertificateVerificationError
	require.ErrorAs(t, err, &cert)
	require.Zero(t, tries, "time does not mend it")
}

type counter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.n.Add(int64(n))
	return n, err
}

// A proxy is used if it is named, and only then (see TestClient).
func TestProxy(t *testing.T) {
	data := content(100_000)
	var asked []string
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.RequestURI)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	defer proxy.Close()
	u, err := url.Parse(proxy.URL)
	require.NoError(t, err)
	p := &Policy{AllowHTTP: true, Proxy: u} // without AllowLoopback
	f, err := Open(t.Context(), "http://updates.example/fw.zip", &Options{Policy: p})
	require.NoError(t, err)
	r, err := f.Ranges(t.Context(), []ota.Range{{Off: 90_000, Len: 10}})
	require.NoError(t, err)
	got, err := io.ReadAll(r)
	require.NoError(t, err)
	require.Equal(t, data[90_000:90_010], got)
	require.NoError(t, r.Close())
	require.NoError(t, f.Close())
	_, err = Open(t.Context(), proxy.URL, &Options{Policy: p})
	require.ErrorIs(t, err, ErrAddress)
	require.Equal(t, []string{"http://updates.example/fw.zip", "http://updates.example/fw.zip"}, asked)
}

// Nothing stays behind on real connections either: neither goroutines nor, at the
// server, connections.
func TestNoLeaks(t *testing.T) {
	data := content(4 << 20)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"x"`)
		if r.URL.Path == "/whole" {
			r.Header.Del("Range")
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	defer srv.Close() // waits for its connections
	before := runtime.NumGoroutine()
	for i := range 30 {
		path := []string{"/", "/whole"}[i%2]
		f, err := Open(t.Context(), srv.URL+path, &Options{Policy: loopback})
		require.NoError(t, err)
		var r io.ReadCloser
		if f.Ranged() {
			var rs []ota.Range
			for off := int64(0); off < int64(len(data)); off += 100_000 {
				rs = append(rs, ota.Range{Off: off, Len: 50_000})
			}
			r, err = f.Ranges(t.Context(), rs)
		} else {
			r, err = f.Stream(t.Context())
		}
		require.NoError(t, err)
		_, err = io.CopyN(io.Discard, r, int64(i)*60_000) // and no further
		require.NoError(t, err)
		require.NoError(t, r.Close())
		require.NoError(t, f.Close())
	}
	// The one is that which looks.
	require.Eventually(t, func() bool { return runtime.NumGoroutine() <= before+1 }, 5*time.Second, 5*time.Millisecond)
}

// endless is a file of which every byte is made up.
type endless struct{ size, at int64 }

func (e *endless) Read(p []byte) (int, error) {
	n := min(int64(len(p)), e.size-e.at)
	if e.at += n; n == 0 {
		return 0, io.EOF
	}
	return int(n), nil
}

func (e *endless) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += e.at
	case io.SeekEnd:
		off += e.size
	}
	e.at = off
	return off, nil
}

// BenchmarkDownload compares File with a plain GET, over loopback.
func BenchmarkDownload(b *testing.B) {
	const size = 256 << 20
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"x"`)
		http.ServeContent(w, r, "", time.Time{}, &endless{size: size})
	}))
	defer srv.Close()
	buf := make([]byte, 256<<10)
	drain := func(b *testing.B, r io.Reader, want int64) {
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, r, buf)
		require.NoError(b, err)
		require.Equal(b, want, n)
	}
	b.Run("http.Get", func(b *testing.B) {
		b.SetBytes(size)
		b.ReportAllocs()
		for b.Loop() {
			res, err := http.Get(srv.URL)
			require.NoError(b, err)
			drain(b, res.Body, size)
			res.Body.Close()
		}
	})
	file := func(b *testing.B, read int64, rs []ota.Range) {
		b.SetBytes(read)
		b.ReportAllocs()
		for b.Loop() {
			f, err := Open(b.Context(), srv.URL, &Options{Policy: loopback})
			require.NoError(b, err)
			var r io.ReadCloser
			if rs == nil {
				r, err = f.Stream(b.Context())
			} else {
				r, err = f.Ranges(b.Context(), rs)
			}
			require.NoError(b, err)
			drain(b, r, read)
			r.Close()
			f.Close()
		}
	}
	b.Run("Stream", func(b *testing.B) { file(b, size, nil) })
	b.Run("Ranges=1", func(b *testing.B) { file(b, size, []ota.Range{{Off: 0, Len: size}}) })
	for _, chunk := range []int64{64 << 10, 1 << 20} {
		var rs []ota.Range
		for off := int64(0); off < size; off += 2 * chunk {
			rs = append(rs, ota.Range{Off: off, Len: chunk})
		}
		b.Run(fmt.Sprintf("Ranges=%d", len(rs)), func(b *testing.B) { file(b, size/2, rs) })
	}
}

// Long headers, and many, are refused cheaply.
func TestLongHeader(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X", strings.Repeat("hidden", 20_000))
	}))
	defer srv.Close()
	_, err := Open(t.Context(), srv.URL, &Options{Policy: loopback, RetryFor: -1})
	require.ErrorIs(t, err, ErrResponse)
	require.NotContains(t, err.Error(), "hidden")
}
