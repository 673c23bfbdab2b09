package fetch

import (
	"bufio"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// names is a name server: for the nth question about any name it answers with
// the nth address, and the last one from then on.
func names(addrs ...string) *net.Resolver {
	var n atomic.Int32
	return &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		c, s := net.Pipe()
		go func() {
			defer s.Close()
			for {
				// A stream has a length before each message (RFC 1035, 4.2.2).
				var size [2]byte
				if _, err := io.ReadFull(s, size[:]); err != nil {
					return
				}
				q := make([]byte, binary.BigEndian.Uint16(size[:]))
				if _, err := io.ReadFull(s, q); err != nil || len(q) < 12 {
					return
				}
				end := 12
				for end < len(q) && q[end] != 0 {
					end += 1 + int(q[end])
				}
				end += 5
				// A and AAAA are asked for at once: count the former.
				kind := binary.BigEndian.Uint16(q[end-4:])
				i := int(n.Load())
				if kind == 1 {
					i = int(n.Add(1)) - 1
				}
				a := netip.MustParseAddr(addrs[min(i, len(addrs)-1)])
				m := append([]byte{q[0], q[1], 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0}, q[12:end]...)
				if a.Is4() == (kind == 1) {
					m[7] = 1
					m = append(m, 0xc0, 12, 0, byte(kind), 0, 1, 0, 0, 0, 0, 0, byte(a.BitLen()/8))
					m = append(m, a.AsSlice()...)
				}
				if _, err := s.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(m))), m...)); err != nil {
					return
				}
			}
		}()
		return c, nil
	}}
}

// get fetches a URL by a new client of p and returns the body.
func get(t testing.TB, p *Policy, rawURL string) (body string, err error) {
	t.Helper()
	c := p.Client()
	defer c.CloseIdleConnections()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, rawURL, nil)
	require.NoError(t, err)
	res, err := Do(c, r)
	if err != nil {
		require.Nil(t, res)
		checkText(t, err, rawURL)
		var e *Error
		require.ErrorAs(t, err, &e)
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return string(b), nil
}

// serve runs a server that must be hit this often.
func serve(t testing.TB, hits int, h http.HandlerFunc) *httptest.Server {
	var n atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n.Add(1)
		h(w, r)
	}))
	t.Cleanup(func() {
		srv.Close()
		require.Equal(t, hits, int(n.Load()), "requests")
	})
	return srv
}

func hello(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }

func port(srv *httptest.Server) string {
	_, p, _ := net.SplitHostPort(srv.Listener.Addr().String())
	return p
}

func TestClient(t *testing.T) {
	srv := serve(t, 2, func(w http.ResponseWriter, r *http.Request) {
		require.Empty(t, r.Header.Get("Accept-Encoding"))
		require.Empty(t, r.Header.Get("Cookie"))
		http.SetCookie(w, &http.Cookie{Name: "a", Value: "b", Path: "/"})
		hello(w, r)
	})
	// A proxy that does not exist.
	for _, v := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"} {
		t.Setenv(v, "http://127.0.0.1:1")
	}
	p := &Policy{AllowHTTP: true, AllowLoopback: true, Resolver: names("127.0.0.1"), Hosts: []string{"updates.example"}}
	c := p.Client()
	defer c.CloseIdleConnections()
	for range 2 {
		r, err := http.NewRequest(http.MethodGet, "http://updates.example:"+port(srv)+"/fw.zip", nil)
		require.NoError(t, err)
		res, err := Do(c, r)
		require.NoError(t, err)
		b, err := io.ReadAll(res.Body)
		require.NoError(t, err)
		require.NoError(t, res.Body.Close())
		require.Equal(t, "hello", string(b))
	}
	_, err := get(t, p, "http://127.0.0.1:"+port(srv)+"/")
	require.ErrorIs(t, err, ErrPolicy)
	_, err = get(t, nil, "http://updates.example/")
	require.ErrorIs(t, err, ErrPolicy)
}

func TestNoDecompression(t *testing.T) {
	srv := serve(t, 1, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		_, _ = io.WriteString(z, "hello")
		_ = z.Close()
	})
	b, err := get(t, &Policy{AllowHTTP: true, AllowLoopback: true}, srv.URL)
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(b, "\x1f\x8b"), "as it came")
}

// Names that stand for addresses which are not public.
func TestResolvedAddress(t *testing.T) {
	srv := serve(t, 0, hello)
	v6 := false
	if l, err := net.Listen("tcp6", "[::1]:0"); err == nil {
		v6 = true
		l.Close()
	}
	for _, a := range []string{
		"127.0.0.1", "127.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
		"224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
		"::1", "fd00::1", "fe80::1", "ff02::1", "::", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1",
	} {
		addr := netip.MustParseAddr(a)
		if addr.Is6() && !addr.Is4In6() && !v6 {
			t.Logf("%s not dialled: this machine has no IPv6", a)
			continue
		}
		_, err := get(t, &Policy{AllowHTTP: true, Resolver: names(a)}, "http://updates.example:"+port(srv)+"/fw.zip?token=hidden")
		require.ErrorIs(t, err, ErrAddress, a)
		require.NotContains(t, err.Error(), "hidden")
		require.Contains(t, err.Error(), `"http://updates.example:`+port(srv)+`/fw.zip"`)
	}
}

// A name server that changes its answer after the first look-up (DNS rebinding).
func TestRebinding(t *testing.T) {
	var srv *httptest.Server
	srv = serve(t, 1, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		http.Redirect(w, r, "http://updates.example:"+port(srv)+"/again", http.StatusFound)
	})
	p := &Policy{AllowHTTP: true, AllowAddrs: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}, Resolver: names("127.0.0.1", "127.0.0.2")}
	_, err := get(t, p, "http://updates.example:"+port(srv)+"/")
	require.ErrorIs(t, err, ErrAddress)
	require.ErrorContains(t, err, "127.0.0.2 is loopback")
	require.ErrorContains(t, err, "/again")
}

func TestRedirects(t *testing.T) {
	other := serve(t, 0, hello) // must not be reached
	for name, c := range map[string]struct {
		location string
		err      []error
	}{
		"file":           {"file:///etc/passwd", []error{ErrRedirect, ErrPolicy}},
		"ftp":            {"ftp://updates.example/", []error{ErrRedirect, ErrPolicy}},
		"metadata":       {"http://169.254.169.254/latest/meta-data/", []error{ErrRedirect, ErrAddress}},
		"loopback":       {"http://127.0.0.2:" + port(other) + "/", []error{ErrRedirect, ErrAddress}},
		"localhost":      {"http://localhost:" + port(other) + "/", []error{ErrRedirect, ErrAddress}},
		"mapped":         {"http://[::ffff:127.0.0.1]:" + port(other) + "/", []error{ErrRedirect, ErrAddress}},
		"decimal":        {"http://2130706433:" + port(other) + "/", []error{ErrRedirect, ErrAddress}},
		"hexadecimal":    {"http://0x7f.1:" + port(other) + "/", []error{ErrRedirect, ErrAddress}},
		"with password":  {"http://u:hidden@updates.example:" + port(other) + "/", []error{ErrRedirect}},
		"other name":     {"http://evil.example:" + port(other) + "/?hidden", []error{ErrAddress}}, // resolved to 127.0.0.2
		"no host":        {"http:///x", []error{ErrRedirect, ErrURL}},
		"bad port":       {"http://updates.example:0/", []error{ErrRedirect, ErrURL}},
		"not a URL":      {"http://%zz/hidden", []error{ErrResponse}},
		"control":        {"http://updates.example/\x01hidden", []error{ErrResponse}},
		"injected":       {"http://updates.example/%0d%0aX-Injected:%201", nil},
		"long":           {"http://updates.example/" + strings.Repeat("x", 9000), []error{ErrRedirect, ErrURL}},
		"back to itself": {"/", []error{ErrRedirect}},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer l.Close()
			_, lport, _ := net.SplitHostPort(l.Addr().String())
			location := strings.Replace(c.location, "updates.example/", "updates.example:"+lport+"/", 1)
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					r, err := http.ReadRequest(bufio.NewReader(conn))
					if err == nil && strings.Contains(r.URL.Path, "Injected") {
						_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
					} else if err == nil {
						_, _ = io.WriteString(conn, "HTTP/1.1 302 Found\r\nLocation: "+location+"\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhidden")
					}
					conn.Close()
				}
			}()
			p := &Policy{
				AllowHTTP: true, AllowAddrs: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")},
				Resolver: names("127.0.0.1", "127.0.0.2"),
			}
			if name == "injected" || name == "back to itself" {
				p.Resolver = names("127.0.0.1")
			}
			_, err = get(t, p, "http://updates.example:"+lport+"/start")
			l.Close()
			<-done
			if c.err == nil {
				require.NoError(t, err)
				return
			}
			for _, want := range c.err {
				require.ErrorIs(t, err, want)
			}
			require.NotContains(t, err.Error(), "hidden")
		})
	}
}

func TestRedirectCount(t *testing.T) {
	for limit, want := range map[int]int{0: DefaultMaxRedirects, -1: 0, 1: 1, 50: 50} {
		var n atomic.Int32
		srv := serve(t, want+1, func(w http.ResponseWriter, r *http.Request) {
			i, _ := strconv.Atoi(r.URL.Path[1:])
			if n.Add(1); i == 10000 {
				hello(w, r)
				return
			}
			http.Redirect(w, r, "/"+strconv.Itoa(i+1), http.StatusFound)
		})
		_, err := get(t, &Policy{AllowHTTP: true, AllowLoopback: true, MaxRedirects: limit}, srv.URL+"/0")
		require.ErrorIs(t, err, ErrRedirect)
		require.ErrorContains(t, err, "more than "+strconv.Itoa(want))
	}
}

// Credentials stay with the origin they are for; a downgrade is refused.
func TestCredentials(t *testing.T) {
	var got http.Header
	b := serve(t, 1, func(w http.ResponseWriter, r *http.Request) { got = r.Header; hello(w, r) })
	a := serve(t, 4, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/away":
			http.Redirect(w, r, b.URL+"/fw.zip", http.StatusTemporaryRedirect)
		case "/here":
			http.Redirect(w, r, "/fw.zip", http.StatusFound)
		default:
			got = r.Header
			hello(w, r)
		}
	})
	p := &Policy{AllowHTTP: true, AllowLoopback: true}
	c := p.Client()
	defer c.CloseIdleConnections()
	do := func(path string) {
		r, err := http.NewRequest(http.MethodGet, strings.Replace(a.URL, "//", "//u:secret@", 1)+path+"?token=hidden", nil)
		require.NoError(t, err)
		r.Header.Set("Cookie", "a=b")
		r.Header.Set("User-Agent", "demo")
		res, err := Do(c, r)
		require.NoError(t, err)
		require.NoError(t, res.Body.Close())
		require.Equal(t, "demo", got.Get("User-Agent"))
		require.Empty(t, got.Get("Referer"))
	}
	do("/fw.zip")
	require.NotEmpty(t, got.Get("Authorization"))
	do("/here")
	require.NotEmpty(t, got.Get("Authorization"))
	require.NotEmpty(t, got.Get("Cookie"))
	do("/away")
	require.Empty(t, got.Get("Authorization"))
	require.Empty(t, got.Get("Cookie"))
}

func TestTLS(t *testing.T) {
	plain := serve(t, 0, hello)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/down" {
			http.Redirect(w, r, plain.URL, http.StatusFound)
			return
		}
		hello(w, r)
	}))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // it will be told that its certificate is bad
	srv.StartTLS()
	defer srv.Close()
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	p := &Policy{AllowHTTP: true, AllowLoopback: true, TLS: &tls.Config{RootCAs: roots}}
	b, err := get(t, p, srv.URL)
	require.NoError(t, err)
	require.Equal(t, "hello", b)
	_, err = get(t, p, srv.URL+"/down")
	require.ErrorIs(t, err, ErrRedirect)
	require.ErrorContains(t, err, "from https to http")
	_, err = get(t, &Policy{AllowLoopback: true}, srv.URL)
	var cert *tls.CertificateVerificationError
	require.ErrorAs(t, err, &cert)
	_, err = get(t, &Policy{AllowLoopback: true}, strings.Replace(plain.URL, "http:", "https:", 1))
	require.ErrorIs(t, err, http.ErrSchemeMismatch)
}

// What a service answers that does not speak HTTP does not get into the error,
// and costs little.
func TestHostileAnswers(t *testing.T) {
	for name, answer := range map[string]string{
		"banner":         "SSH-2.0-OpenSSH_hidden\r\n",
		"redis":          "-ERR hidden\r\n",
		"bad status":     "HTTP/1.1 hidden OK\r\n\r\n",
		"bad version":    "HTTP/hidden 200 OK\r\n\r\n",
		"bad header":     "HTTP/1.1 200 OK\r\nhidden\r\n\r\n",
		"no name":        "HTTP/1.1 200 OK\r\n: hidden\r\n\r\n",
		"bad length":     "HTTP/1.1 200 OK\r\nContent-Length: hidden\r\n\r\n",
		"two lengths":    "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhidden",
		"bad transfer":   "HTTP/1.1 200 OK\r\nTransfer-Encoding: hidden\r\n\r\n",
		"long header":    "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("hidden", 20000) + "\r\n\r\n",
		"many headers":   "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: hidden\r\n", 20000) + "\r\n",
		"many continues": strings.Repeat("HTTP/1.1 103 Early Hints\r\nX: hidden\r\n\r\n", 20000),
		"nothing":        "",
		"half":           "HTTP/1.1 200 OK\r\nX: hidd",
		"control":        "HTTP/1.1 200 OK\r\nX: hidden\x00\r\n\r\n",
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = http.ReadRequest(bufio.NewReader(c))
				_, _ = io.WriteString(c, answer)
				c.Close()
			}
		}()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err = get(t, &Policy{AllowHTTP: true, AllowLoopback: true}, "http://"+l.Addr().String()+"/")
		runtime.ReadMemStats(&after)
		l.Close()
		<-done
		require.Error(t, err, name)
		require.NotContains(t, err.Error(), "hid", name)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(4<<20), name)
	}
}

func TestTimeouts(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // accepts nothing
	require.NoError(t, err)
	defer l.Close()
	for _, scheme := range []string{"http", "https"} {
		_, err = get(t, &Policy{AllowHTTP: true, AllowLoopback: true, Timeout: 50 * time.Millisecond}, scheme+"://"+l.Addr().String()+"/")
		var ne net.Error
		require.ErrorAs(t, err, &ne)
		require.True(t, ne.Timeout())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+l.Addr().String()+"/", nil)
	require.NoError(t, err)
	c := (&Policy{AllowHTTP: true, AllowLoopback: true}).Client()
	_, err = Do(c, r)
	require.ErrorIs(t, err, context.Canceled)
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// Do cleans up after any client.
func TestDo(t *testing.T) {
	boom := errors.New("hidden")
	c := &http.Client{Transport: roundTrip(func(*http.Request) (*http.Response, error) { return nil, boom })}
	r, err := http.NewRequest(http.MethodPost, "https://u:hidden@h/fw.zip?hidden#hidden", strings.NewReader("x"))
	require.NoError(t, err)
	_, err = Do(c, r)
	require.EqualError(t, err, `fetch: "https://h/fw.zip": the answer is not the HTTP that was expected`)
	require.ErrorIs(t, err, boom)
	require.ErrorIs(t, err, ErrResponse)

	// The body of a request that is refused is closed, as RoundTrippers must.
	body := &closed{Reader: strings.NewReader("x")}
	r, err = http.NewRequest(http.MethodPost, "http://h/", body)
	require.NoError(t, err)
	_, err = Do((&Policy{}).Client(), r)
	require.ErrorIs(t, err, ErrPolicy)
	require.True(t, body.is)

	e := &Error{URL: "https://h/\x1b[2J" + strings.Repeat("x", 100), Err: errors.New("a\nb" + strings.Repeat("c", 1000))}
	checkText(t, e, "")
	require.Contains(t, e.Error(), "a?b")
	require.Empty(t, clean(nil))
	require.Equal(t, "https://h/p", clean(&url.URL{Scheme: "https", Host: "h", Path: "/p", RawQuery: "q", Fragment: "f", User: url.User("u")}))
}

type closed struct {
	io.Reader
	is bool
}

func (c *closed) Close() error { c.is = true; return nil }
