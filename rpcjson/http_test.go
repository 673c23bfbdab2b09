package rpcjson

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/fetch"
)

// raw sends the text of a request to srv over a connection of its own.
func raw(t *testing.T, srv *httptest.Server, request string) (*http.Response, string) {
	t.Helper()
	c, err := net.Dial("tcp", srv.Listener.Addr().String())
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	_, err = io.WriteString(c, request)
	require.NoError(t, err)
	req, err := http.ReadRequest(bufio.NewReader(strings.NewReader(request)))
	require.NoError(t, err)
	res, err := http.ReadResponse(bufio.NewReader(c), req)
	require.NoError(t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res, string(b)
}

func TestHTTPVectors(t *testing.T) {
	var v struct {
		Cases []struct {
			Name      string
			Exchanges []struct {
				Request, Response string
				Status            int    `json:"response_status"`
				Body              string `json:"response_body"`
				RPC               string
			}
		}
	}
	readVectors(t, "http.json", &v)
	require.Len(t, v.Cases, 30)
	for _, c := range v.Cases {
		t.Run(c.Name, func(t *testing.T) {
			d := newFake()
			d.errs["commit"] = ota.ErrCommitted
			s := newTest(t, d, func(o *Options) {
				o.AllowGET = []string{"sys.reboot"}
				o.Fetch = &fetch.Policy{AllowHTTP: true}
				o.HTTPClient = &http.Client{Transport: roundTrip(func(*http.Request) *http.Response {
					return response(200, "firmware")
				})}
				if c.Name == "rest/acl-denied-403" {
					o.NoAuth = false
					o.Authorizer = AuthorizerFunc(func(context.Context, *Peer, string, Right) error { return ErrForbidden })
				}
			})
			user := func(name, result string) {
				require.NoError(t, s.Handle(name, "", Read, func(_ context.Context, r *Request) (any, error) {
					if key, _ := r.Args.String("key"); name == "Config.Get" && key != "update" {
						return nil, &Error{Code: 404, Message: "invalid config key"}
					}
					return json.RawMessage(result), nil
				}))
			}
			user("FS.List", `["conf0.json","init.js"]`)
			user("FS.ListExt", `[{"name": "conf0.json", "size": 10}]`)
			user("FS.Get", `{"data": "aGVsbG8=", "left": 0}`)
			user("FS.Put", `null`)
			user("Config.Get", `{"timeout": 600, "commit_timeout": 0}`)
			if c.Name == "rest/get-query-string-value" {
				user("Config.Get", `{"timeout": 600,"commit_timeout": 0}`)
			}
			if c.Name == "ota/status-busy" {
				require.Equal(t, null, do(t, s, "OTA.Begin", ""))
			}
			srv := httptest.NewServer(s)
			defer srv.Close()
			require.NotEmpty(t, c.Exchanges)
			for _, x := range c.Exchanges {
				res, body := raw(t, srv, x.Request)
				require.Equal(t, x.Status, res.StatusCode)
				require.Equal(t, strconv.Itoa(len(body)), res.Header.Get("Content-Length"))
				require.Equal(t, "application/json", res.Header.Get("Content-Type"))
				for k := range res.Header {
					require.NotContains(t, k, "Access-Control")
				}
				want := "Connection: close"
				if strings.Contains(x.Request, "Keep-Alive") {
					want = "Connection: keep-alive"
				}
				require.Contains(t, x.Response, "\r\n"+want+"\r\n")
				require.Equal(t, want == "Connection: close", res.Close)
				switch {
				case c.Name == "call/RPC.List":
					// The client's counterpart had no Sys.GetUID, and no user methods.
					body = strings.NewReplacer(`"Config.Get","FS.Put","FS.Get","FS.ListExt","FS.List","Sys.GetUID",`, "",
						`"Sys.GetInfo","Sys.Reboot"`, `"Sys.GetInfo","Sys.Reboot"`).Replace(body)
				case x.RPC == "RPC.Ping":
					require.Regexp(t, `"channel_info": "127\.0\.0\.1:\d+"`, body)
					i := strings.Index(body, `"127.`)
					j := i + 1 + strings.Index(body[i+1:], `"`)
					body = body[:i] + `"127.0.0.1:12345` + body[j:]
				case x.RPC == "OTA.End":
					// Values of this reply are placeholders.
					body = strings.Replace(body, `"progress_percent": 100`, `"progress_percent": 0`, 1)
				case c.Name == "call/OTA.Update-g1-code0":
					// That is how G1 devices say it.
					x.Body = strings.Replace(x.Body, `"error":{"code":0,"message":"Update applied, finalizing"}`, `"result":true`, 1)
				}
				require.Equal(t, x.Body, body)
			}
			if c.Name == "ota/full" {
				require.Len(t, d.got, 2558)
				require.Equal(t, 300*time.Second, d.opts.CommitTimeout)
			}
			if c.Name == "rest/get-query" {
				require.Eventually(t, func() bool {
					s.mu.Lock()
					defer s.mu.Unlock()
					return !s.due.IsZero()
				}, 10*time.Second, time.Millisecond, "due once the answer is sent")
			}
		})
	}
}

const good = `{"id":1,"method":"OTA.GetBootState"}`

// try sends a request without a network.
func try(s *Server, method, target, body string, change func(*http.Request)) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	r.Host = "192.168.1.2"
	if method == http.MethodPost {
		r.Header.Set("Content-Type", "application/json")
	}
	if change != nil {
		change(r)
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w
}

// DNS rebinding: the same connection, first the device's address, then a
// foreign name.
func TestRebinding(t *testing.T) {
	srv := httptest.NewServer(newTest(t, newFake(), nil))
	defer srv.Close()
	c, err := net.Dial("tcp", srv.Listener.Addr().String())
	require.NoError(t, err)
	defer c.Close()
	r := bufio.NewReader(c)
	for host, want := range map[string]int{"127.0.0.1": 200, "evil.example": 403} {
		_, err = io.WriteString(c, "GET /rpc/OTA.Status HTTP/1.1\r\nHost: "+host+"\r\nConnection: keep-alive\r\n\r\n")
		require.NoError(t, err)
		res, err := http.ReadResponse(r, nil)
		require.NoError(t, err)
		_, err = io.Copy(io.Discard, res.Body)
		require.NoError(t, err)
		require.Equal(t, want, res.StatusCode)
	}
}

func TestHTTPAnswers(t *testing.T) {
	for _, c := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"POST", "/rpc", "garbage", 400, "Invalid request"},
		{"POST", "/rpc", "", 400, "Invalid request"},
		{"POST", "/rpc", `{"id":null,"method":"OTA.Commit"}`, 400, "Invalid request"},
		{"POST", "/rpc", `{"method":"OTA.GetBootState"}`, 204, ""},
		{"POST", "/rpc", `{"id":1,"result":5}`, 204, ""},
		{"POST", "/rpc", `{"id":1,"method":"Nope"}`, 200, `{"id":1,"src":"esp32_123456","error":{"code":404,"message":"No handler for Nope"}}` + "\r\n"},
		{"POST", "/rpc/OTA.Nope", "", 404, `{"code":404,"message":"No handler for OTA.Nope"}` + "\r\n"},
		{"POST", "/rpc/OTA.Write", "{}", 500, `{"code":-1,"message":"Update not started"}` + "\r\n"},
		{"POST", "/rpc/OTA.CreateSnapshot", `{"set_as_revert":tru`, 500, `{"code":400,"message":"bad request: params: byte 17: need true"}` + "\r\n"},
		{"POST", "/rpc/OTA.CreateSnapshot", "\x00", 500, `{"code":400,"message":"bad request: params: byte 0: need a value"}` + "\r\n"},
		{"POST", "/rpc/RPC.Describe", ` {name: "RPC.List"} `, 200, `{"name": "RPC.List", "args_fmt": ""}` + "\r\n"},
		{"GET", "/rpc/RPC.Describe?name=%22RPC.List%22&&x=1", "", 200, `{"name": "RPC.List", "args_fmt": ""}` + "\r\n"},
		{"GET", "/rpc/RPC.Describe?name=RPC.List", "", 500, `{"code":400,"message":"bad request: params: name: need a JSON value (a string in quotes: %22...%22), got \"RPC.List\""}` + "\r\n"},
		{"GET", "/rpc/RPC.Describe?name=1,%22x%22:2", "", 500, `{"code":400,"message":"bad request: params: name: need a JSON value (a string in quotes: %22...%22), got \"1,\\\"x\\\":2\""}` + "\r\n"},
		{"GET", "/rpc/RPC.Describe?name=%zz", "", 500, `{"code":400,"message":"bad request: params: name: bad % escape"}` + "\r\n"},
		{"GET", "/rpc/RPC.Describe?%zz=1", "", 500, `{"code":400,"message":"bad request: params: name: bad % escape"}` + "\r\n"},
		{"GET", "/rpc/RPC.Describe?a%22b=1&%22name%22=2", "", 500, `{"code":400,"message":"name is required"}` + "\r\n"},
		{"GET", "/rpc/RPC.Describe?" + strings.Repeat("a", DefaultMaxFrame+1), "", 414, `{"code":414,"message":"query of 131073 bytes, at most 131072"}` + "\r\n"},
		{"POST", "/rpc", good + strings.Repeat(" ", DefaultMaxFrame), 413, `{"code":413,"message":"body of 131108 bytes, at most 131072"}` + "\r\n"},
		{"OPTIONS", "/rpc/OTA.Status", "", 200, ""},
	} {
		s := newTest(t, newFake(), nil)
		r := httptest.NewRequest(c.method, "/", strings.NewReader(c.body))
		path, query, _ := strings.Cut(c.path, "?")
		r.URL.Path, r.URL.RawQuery = path, query
		r.Host = "10.0.0.1"
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		require.Equal(t, c.status, w.Code, c.path)
		require.Equal(t, c.want, w.Body.String(), c.path)
		if c.status != 204 {
			require.Equal(t, strconv.Itoa(len(c.want)), w.Header().Get("Content-Length"), c.path)
		}
	}
}

type challenge struct{ error }

func (challenge) WWWAuthenticate() string { return `Bearer realm="RPC"` }
func (c challenge) Unwrap() error         { return c.error }

func TestHTTPUnauthenticated(t *testing.T) {
	var peer Peer
	s := newTest(t, newFake(), func(o *Options) {
		o.NoAuth = false
		o.Authorizer = AuthorizerFunc(func(_ context.Context, p *Peer, _ string, _ Right) error {
			peer = *p
			if p.Request.Header.Get("Authorization") == "Bearer x" {
				return nil
			}
			return challenge{ErrUnauthenticated}
		})
	})
	for path, body := range map[string]string{"/rpc": good, "/rpc/OTA.Status": "", "/rpc/OTA.Commit": ""} {
		w := try(s, "POST", path, body, nil)
		require.Equal(t, 401, w.Code)
		require.Equal(t, `Bearer realm="RPC"`, w.Header().Get("WWW-Authenticate"))
		require.Equal(t, `{"code":401,"message":"unauthenticated"}`+"\r\n", w.Body.String())
		w = try(s, "POST", path, body, func(r *http.Request) { r.Header.Set("Authorization", "Bearer x") })
		require.Equal(t, 200, w.Code)
		require.Equal(t, "HTTP", peer.Channel)
		require.Equal(t, "192.0.2.1:1234", peer.Addr)
	}
}

// slowBody gives one byte and then waits.
type slowBody struct {
	stop chan struct{}
	once sync.Once
}

func (b *slowBody) Read(p []byte) (int, error) {
	n := 0
	b.once.Do(func() { p[0] = '{'; n = 1 })
	if n == 0 {
		<-b.stop
		return 0, io.ErrUnexpectedEOF
	}
	return n, nil
}

func TestHTTPLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), func(o *Options) { o.MaxPending = 3; o.MaxFrame = 100 })
		stop := make(chan struct{})
		codes := make(chan int, 3)
		for range 3 {
			go func() {
				codes <- try(s, "POST", "/rpc", "x", func(r *http.Request) { r.Body = io.NopCloser(&slowBody{stop: stop}) }).Code
			}()
		}
		synctest.Wait()
		w := try(s, "POST", "/rpc", good, nil)
		require.Equal(t, 503, w.Code)
		require.Equal(t, "1", w.Header().Get("Retry-After"))
		require.Equal(t, 200, try(s, "GET", "/rpc/OTA.GetBootState", "", nil).Code, "slow bodies do not keep others from looking")
		close(stop)
		for range 3 {
			require.Equal(t, 400, <-codes)
		}
		require.Equal(t, 200, try(s, "POST", "/rpc", good, nil).Code)

		// A body of unknown length.
		unknown := func(r *http.Request) { r.ContentLength = -1; r.Body = io.NopCloser(io.MultiReader(r.Body)) }
		require.Equal(t, 200, try(s, "POST", "/rpc", good, unknown).Code)
		require.Equal(t, 200, try(s, "POST", "/rpc", good+strings.Repeat(" ", 100-len(good)), unknown).Code)
		require.Equal(t, 413, try(s, "POST", "/rpc", good+strings.Repeat(" ", 101-len(good)), unknown).Code)

		require.NoError(t, s.Handle("Wait", "", Read, func(ctx context.Context, _ *Request) (any, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}))
		recorded := make(chan *httptest.ResponseRecorder, 6)
		for range 3 {
			go func() { recorded <- try(s, "GET", "/rpc/Wait", "", nil) }()
		}
		synctest.Wait()
		require.Equal(t, 503, try(s, "GET", "/rpc/OTA.Status", "", nil).Code)
		require.Contains(t, try(s, "POST", "/rpc", good, nil).Body.String(), `"error":{"code":429,"message":"Request queue overflow"}`)
		require.NoError(t, s.Close())
		for range 3 {
			w := <-recorded
			require.Equal(t, 503, w.Code)
			require.Contains(t, w.Body.String(), "shutting down")
		}
		require.Equal(t, 503, try(s, "POST", "/rpc", good, nil).Code)
	})
}

// The reply is out before the reboot, over a real connection.
func TestHTTPReplyBeforeReboot(t *testing.T) {
	// Counted as below, in a goroutine.
	count := make(chan int)
	go func() { count <- runtime.NumGoroutine() }()
	before := <-count
	d := newFake()
	o := testOptions()
	s, err := newServer(d, o)
	require.NoError(t, err)
	srv := httptest.NewServer(s)
	res, body := raw(t, srv, "POST /rpc/OTA.Revert HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n")
	require.Equal(t, 200, res.StatusCode)
	require.Equal(t, "null\r\n", body)
	require.Zero(t, d.rebootCount())
	require.Eventually(t, func() bool { return d.rebootCount() == 1 }, 10*time.Second, 5*time.Millisecond)
	srv.Close()
	require.NoError(t, s.Close())
	require.Eventually(t, func() bool { return runtime.NumGoroutine() <= before }, 10*time.Second, 5*time.Millisecond, "goroutines are left")
}

// 10^4 requests from 50 clients are answered or refused, and leave nothing behind.
func TestHTTPLoad(t *testing.T) {
	s := newTest(t, newFake(), nil)
	before := runtime.NumGoroutine()
	var wg sync.WaitGroup
	bad := make(chan int, 10000)
	for range 50 {
		wg.Go(func() {
			for range 200 {
				if c := try(s, "POST", "/rpc", good, nil).Code; c != 200 && c != 503 {
					bad <- c
				}
			}
		})
	}
	wg.Wait()
	require.Empty(t, bad)
	require.Empty(t, s.pending)
	require.Empty(t, s.reading)
	require.Eventually(t, func() bool { return runtime.NumGoroutine() <= before+1 }, 10*time.Second, 5*time.Millisecond, "goroutines are left")
}

// Headers that every answer has.
func TestHTTPHeaders(t *testing.T) {
	s := newTest(t, newFake(), nil)
	for _, c := range []struct {
		method, path, body string
		status             int
	}{
		{"POST", "/rpc", good, 200},
		{"POST", "/rpc", `{"method":"OTA.Status"}`, 204},
		{"POST", "/rpc", `{"method":"OTA.Write"}`, 204}, // fails, and wants no reply
		{"POST", "/rpc", "garbage", 400},
		{"GET", "/rpc/OTA.Status", "", 200},
		{"GET", "/rpc/OTA.Commit", "", 405},
		{"GET", "/other", "", 404},
		{"OPTIONS", "/rpc", "", 200},
	} {
		w := try(s, c.method, c.path, c.body, nil)
		require.Equal(t, c.status, w.Code, c.path)
		require.Equal(t, "nosniff", w.Header().Get("X-Content-Type-Options"), c.path)
		require.Equal(t, "no-store", w.Header().Get("Cache-Control"), c.path)
	}
}

// waiting registers a method that ends with err after d, or when its context does.
func waiting(t testing.TB, s *Server, d time.Duration, err error) {
	t.Helper()
	require.NoError(t, s.Handle("Slow", "", Read, func(ctx context.Context, _ *Request) (any, error) {
		select {
		case <-time.After(d):
			return "done", err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}))
}

// A call that was given up is no success.
func TestHTTPGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		waiting(t, s, time.Hour, nil)
		for _, c := range [][3]string{{"POST", "/rpc/Slow", ""}, {"GET", "/rpc/Slow", ""}, {"POST", "/rpc", `{"id":1,"method":"Slow"}`}, {"POST", "/rpc", `{"method":"Slow"}`}} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			w := try(s, c[0], c[1], c[2], func(r *http.Request) { *r = *r.WithContext(ctx) })
			cancel()
			require.Equal(t, 503, w.Code)
			require.Equal(t, `{"code":503,"message":"the call was given up; it may still be going on"}`+"\r\n", w.Body.String())
		}
	})
}

// readReply reads the answer to a request of the given method.
func readReply(t testing.TB, c net.Conn, method string) (status int, body string) {
	t.Helper()
	res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	require.NoError(t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res.StatusCode, string(b)
}

// The time limits of the http.Server are for requests and answers, not for what
// goes on between them.
func TestHTTPServerTimeouts(t *testing.T) {
	for _, head := range []string{
		"POST /rpc/Slow HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 0\r\n",
		"POST /rpc/Slow HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n",
		"GET /rpc/Slow HTTP/1.1\r\n",
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newTest(t, newFake(), nil)
			waiting(t, s, time.Hour, nil)
			n := servePipes(t, &http.Server{Handler: s, ReadTimeout: time.Second, WriteTimeout: 2 * time.Second})
			text := head + "Host: 127.0.0.1\r\n\r\n"
			if strings.Contains(head, "Length: 2") {
				text += "{}"
			}
			start := time.Now()
			method, _, _ := strings.Cut(head, " ")
			status, body := readReply(t, n.send(t, text), method)
			require.Equal(t, 200, status, head)
			require.Equal(t, "\"done\"\r\n", body, head)
			require.Equal(t, time.Hour, time.Since(start))
		})
	}
}

// Clients that stop sending or reading do not stay.
func TestHTTPDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		served := make(chan time.Time, 1)
		n := servePipes(t, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.ServeHTTP(w, r)
			served <- time.Now()
		})})
		start := time.Now()
		c := n.send(t, "POST /rpc HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
		status, _ := readReply(t, c, "POST")
		require.Equal(t, 400, status)
		require.Equal(t, readTimeout, (<-served).Sub(start), "body")

		start = time.Now()
		c = n.send(t, "POST /rpc HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nContent-Length: 200000\r\n\r\n")
		status, _ = readReply(t, c, "POST")
		require.Equal(t, 413, status)
		require.Equal(t, readTimeout, (<-served).Sub(start), "body that is not wanted")

		start = time.Now()
		n.send(t, "GET /rpc/OTA.Status HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
		require.Equal(t, writeTimeout, (<-served).Sub(start), "answer")
		require.Empty(t, s.reading)
		require.Empty(t, s.pending)
	})
}

// The time until the reboot counts from when the client has its answer.
func TestHTTPRebootAfterAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s := newTest(t, d, nil)
		n := servePipes(t, &http.Server{Handler: s})
		c := n.send(t, "POST /rpc/Sys.Reboot HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n")
		time.Sleep(5 * time.Second)
		require.Zero(t, d.rebootCount())
		start := time.Now()
		status, body := readReply(t, c, "POST")
		require.Equal(t, 200, status)
		require.Equal(t, "null\r\n", body)
		time.Sleep(time.Second)
		require.Len(t, d.rebootTimes(), 1)
		require.Equal(t, rebootDelay, d.rebootTimes()[0].Sub(start))
	})
}

// A page can make a browser GET anything; only the Referer may give it away.
func TestAllowGET(t *testing.T) {
	for referer, want := range map[string]int{
		"":                                     200, // a browser need not send one
		"http://192.168.1.2/page?x#y":          200,
		"https://192.168.1.2/":                 200,
		"https://api.cesanta.com/any/page":     200, // in AllowOrigins
		"http://evil.example/":                 403,
		"http://192.168.1.2.evil.example/":     403,
		"http://192.168.1.2@evil.example/":     403,
		"http://192.168.1.2:81/":               403,
		"http://api.cesanta.com/":              403,
		"https://api.cesanta.com.evil.example": 403,
		"about:blank":                          403,
		"/rpc":                                 403,
		"%":                                    403,
	} {
		d := newFake()
		s := newTest(t, d, func(o *Options) {
			o.AllowGET = []string{"OTA.Revert"}
			o.AllowOrigins = []string{"https://api.cesanta.com/"}
		})
		set := func(r *http.Request) {
			if referer != "" {
				r.Header.Set("Referer", referer)
			}
		}
		w := try(s, "GET", "/rpc/ota.revert", "", set)
		require.Equal(t, want, w.Code, referer)
		if want == 403 {
			require.Contains(t, w.Body.String(), `{"code":403,"message":"Referer `, referer)
			require.Empty(t, d.log(), referer)
		}
		require.Equal(t, 200, try(s, "GET", "/rpc/OTA.Status", "", set).Code, "looking is no danger")
		require.Equal(t, 405, try(s, "GET", "/rpc/OTA.Commit", "", set).Code)
	}
	s := newTest(t, newFake(), func(o *Options) { o.AllowGET = []string{"OTA.Revert"} })
	w := try(s, "GET", "/rpc/OTA.Revert", "", func(r *http.Request) {
		r.Header["Referer"] = []string{"http://192.168.1.2/", "http://evil.example/"}
	})
	require.Equal(t, 403, w.Code)
}

// roundTrip is a transport without a network.
type roundTrip func(*http.Request) *http.Response

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) {
	res := f(r)
	if res == nil {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	res.Request = r
	return res, nil
}

func response(status int, body string) *http.Response {
	return &http.Response{
		StatusCode: status, ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{}, ContentLength: int64(len(body)), Body: io.NopCloser(bytes.NewReader([]byte(body))),
	}
}
