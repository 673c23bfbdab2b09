package rpcjson

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

// form returns the body of a form, and its type. Fields are name and value; a name
// that begins with @ is a file.
func form(t testing.TB, fields ...string) (string, string) {
	t.Helper()
	var b bytes.Buffer
	m := multipart.NewWriter(&b)
	for i := 0; i < len(fields); i += 2 {
		var w io.Writer
		var err error
		if name, ok := strings.CutPrefix(fields[i], "@"); ok {
			w, err = m.CreateFormFile(name, "fw.zip")
		} else {
			w, err = m.CreateFormField(fields[i])
		}
		require.NoError(t, err)
		_, err = io.WriteString(w, fields[i+1])
		require.NoError(t, err)
	}
	require.NoError(t, m.Close())
	return b.String(), m.FormDataContentType()
}

// tryUpdate sends a request to the paths for people.
func tryUpdate(s *Server, method, target, contentType, body string, change func(*http.Request)) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	r.Host = "192.168.1.2"
	if contentType != "" {
		r.Header.Set("Content-Type", contentType)
	}
	if change != nil {
		change(r)
	}
	w := httptest.NewRecorder()
	s.UpdateHandler().ServeHTTP(w, r)
	return w
}

func TestUpload(t *testing.T) {
	firmware := strings.Repeat("firmware", 100_000)
	for _, c := range []struct {
		name   string
		fields []string
		change func(*fakeDevice, *Options)
		status int
		want   string
	}{
		{"file", []string{"@file", firmware}, nil, 200, "1 Update applied, rebooting"},
		{"any name", []string{"@filedata", firmware}, nil, 200, "1 Update applied, rebooting"},
		{"fields", []string{"commit_timeout", "300", "timeout", "60", "ignore_same_version", "1", "other", "x", "@file", firmware}, nil, 200, "1 Update applied, rebooting"},
		{"same", []string{"@file", firmware}, func(d *fakeDevice, _ *Options) {
			d.update = func(context.Context, io.Reader) (ota.UpdateResult, error) { return ota.UpdateResult{Same: true}, nil }
		}, 200, "1 Version is the same as current"},
		{"fails", []string{"@file", firmware}, func(d *fakeDevice, _ *Options) {
			d.update = func(context.Context, io.Reader) (ota.UpdateResult, error) { return ota.UpdateResult{}, mgosError{} }
		}, 500, "-11 Invalid CRC"},
		{"fails at once", []string{"@file", firmware}, func(d *fakeDevice, _ *Options) { d.errs["update"] = ota.ErrPlatform }, 500, "-1 the image is for another platform"},
		{"busy", []string{"@file", firmware}, func(d *fakeDevice, _ *Options) { d.busy = "update" }, 409, "Another update is in progress."},
		{"uncommitted", []string{"@file", firmware}, func(d *fakeDevice, _ *Options) { d.state.Committed = false }, 500, "-1 the firmware is not committed yet"},
		{"switched off", []string{"@file", firmware}, func(_ *fakeDevice, o *Options) { o.Open = nil }, 400, "POST updates are disabled."},
		{"no file", []string{"file", "x"}, nil, 400, "no file in the form"},
		{"bad timeout", []string{"timeout", "soon", "@file", firmware}, nil, 400, `timeout: need an integer, got "soon"`},
		{"twice", []string{"timeout", "1", "timeout", "2", "@file", firmware}, nil, 400, "more than one timeout"},
		{"long field", []string{"timeout", strings.Repeat("1", 65), "@file", firmware}, nil, 400, `"timeout": need at most 64 bytes`},
		{"long name", []string{strings.Repeat("x", 100_000), "1", "@file", firmware}, nil, 400, "malformed form"},
		{"bad flag", []string{"ignore_same_version", "yes", "@file", firmware}, nil, 400, "ignore_same_version: need 0 or 1"},
		{"late field", []string{"@file", firmware, "commit_timeout", "300"}, nil, 500, "-1 the file must be the last field of the form"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newFake()
			s := newTest(t, d, func(o *Options) {
				if c.change != nil {
					c.change(d, o)
				}
			})
			body, kind := form(t, c.fields...)
			w := tryUpdate(s, "POST", "/update", kind, body, nil)
			require.Equal(t, c.want+"\r\n", w.Body.String())
			require.Equal(t, c.status, w.Code)
			require.Equal(t, "text/plain", w.Header().Get("Content-Type"))
			if c.want == "1 Update applied, rebooting" {
				require.Equal(t, firmware, string(d.got))
				require.False(t, s.due.IsZero(), "a reboot is due")
			} else {
				require.True(t, s.due.IsZero())
			}
			if c.name == "fields" {
				require.Equal(t, ota.UpdateOptions{CommitTimeout: 300 * time.Second, IgnoreSameVersion: true}, d.opts)
			}
			require.Empty(t, s.pending)
		})
	}
	// Cut off, damaged, endless.
	s := newTest(t, newFake(), nil)
	body, kind := form(t, "@file", firmware)
	for i, c := range map[string]string{
		body[:len(body)/2]:           "-13 Unexpected end of data",
		"":                           "malformed form",
		strings.Repeat("x", 100_000): "malformed form",
	} {
		require.Equal(t, c+"\r\n", tryUpdate(s, "POST", "/update", kind, i, nil).Body.String())
	}
	require.Equal(t, "malformed form\r\n", tryUpdate(s, "POST", "/update", "multipart/form-data", body, nil).Body.String())
}

func TestUpdateForms(t *testing.T) {
	d := newFake()
	var downloaded []string
	s := newTest(t, d, func(o *Options) {
		o.HTTPClient = &http.Client{Transport: roundTrip(func(r *http.Request) *http.Response {
			downloaded = append(downloaded, r.URL.String())
			if r.URL.Path == "/missing" {
				return response(404, "")
			}
			return response(200, "firmware")
		})}
	})
	const form = "application/x-www-form-urlencoded"
	for _, c := range []struct {
		target, kind, body string
		status             int
		want               string
	}{
		{"/update?url=https://h/missing", "", "", 500, "(-1) Invalid HTTP response code: 404"},
		{"/update?url=http://h/x", "", "", 500, "(-1) url: not allowed: need https"},
		{"/update?url=https://h/x&timeout=x", "", "", 400, `timeout: need an integer, got "x"`},
		{"/update", "", "", 400, "Update URL not specified and none is configured."},
		{"/update", form, "url=https://h/fw.zip&commit_timeout=300", 200, "(1) Update applied, rebooting"},
		{"/update/commit", "", "", 200, "Ok"},
		{"/update/commit?trial=0123456789abcdef", "", "", 200, "Ok"},
		{"/update/commit?trial=x", "", "", 400, `trial: need 16 hexadecimal digits, got "x"`},
		{"/update/revert/", form, "", 200, "Ok"},
		{"/update/other", "", "", 404, "no such path"},
		{"/update/commit", "text/plain", "x", 415, "need a form: multipart/form-data or application/x-www-form-urlencoded"},
		{"/update", form, strings.Repeat("x", DefaultMaxFrame+1), 413, "body of 131073 bytes, at most 131072"},
		{"/update", form, "%zz", 400, "malformed form"},
	} {
		w := tryUpdate(s, "POST", c.target, c.kind, c.body, nil)
		require.Equal(t, c.want+"\r\n", w.Body.String(), c.target)
		require.Equal(t, c.status, w.Code, c.target)
		s.mu.Lock()
		s.due = time.Time{} // of a reboot
		s.mu.Unlock()
		d.pending = false
	}
	require.Equal(t, []string{"https://h/missing", "https://h/fw.zip"}, downloaded)
	require.Equal(t, 300*time.Second, d.opts.CommitTimeout)
	require.True(t, d.opts.IgnoreSameVersion, "as the original")
	require.Equal(t, []string{"update", "commit", "commit 0123456789abcdef", "revert"}, d.log())
	d.errs["commit"] = ota.ErrCommitted
	require.Equal(t, "Error\r\n", tryUpdate(s, "POST", "/update/commit", "", "", nil).Body.String())
	d.busy = "update"
	w := tryUpdate(s, "POST", "/update?url=https://h/x", "", "", nil)
	require.Equal(t, 409, w.Code)
	require.Equal(t, "Another update is in progress.\r\n", w.Body.String())
}

// Forms are what web pages can send: none of another page does anything, and
// neither does a GET.
func TestUpdateFromPages(t *testing.T) {
	d := newFake()
	s := newTest(t, d, func(o *Options) { o.AllowOrigins = []string{"https://friend.example"} })
	body, kind := form(t, "@file", "firmware")
	type header = map[string]string
	for _, c := range []struct {
		method string
		header header
		status int
	}{
		{"POST", nil, 200},
		{"POST", header{"Origin": "http://192.168.1.2"}, 200},
		{"POST", header{"Sec-Fetch-Site": "same-origin"}, 200},
		{"POST", header{"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site"}, 200},
		{"POST", header{"Referer": "http://192.168.1.2/page"}, 200},
		{"POST", header{"Host": "evil.example"}, 403},
		{"POST", header{"Origin": "http://evil.example"}, 403},
		{"POST", header{"Origin": "null"}, 403},
		{"POST", header{"Sec-Fetch-Site": "cross-site"}, 403},
		{"POST", header{"Sec-Fetch-Site": "same-site"}, 403},
		{"POST", header{"Referer": "http://evil.example/"}, 403},
		{"GET", nil, 405}, {"HEAD", nil, 405}, {"OPTIONS", nil, 405}, {"PUT", nil, 405}, {"DELETE", nil, 405},
	} {
		for _, path := range []string{"/update", "/update/commit", "/update/revert", "/update?url=https://h/x"} {
			d.mu.Lock()
			d.calls, d.pending, d.busy = nil, false, ""
			d.mu.Unlock()
			s.mu.Lock()
			s.due = time.Time{}
			s.mu.Unlock()
			k, b := kind, body
			if path != "/update" {
				k, b = "", ""
				if c.status == 200 && strings.Contains(path, "?") {
					continue
				}
			}
			w := tryUpdate(s, c.method, path, k, b, func(r *http.Request) {
				for k, v := range c.header {
					r.Header.Set(k, v)
					if k == "Host" {
						r.Host = v
					}
				}
			})
			require.Equal(t, c.status, w.Code, "%v %s: %s", c, path, w.Body)
			require.Equal(t, c.status == 200, len(d.log()) > 0, "%v %s", c, path)
		}
	}
	s = newTest(t, d, func(o *Options) { o.AllowGET = []string{"ota.commit"} })
	require.Equal(t, 200, tryUpdate(s, "GET", "/update/commit", "", "", nil).Code)
	require.Equal(t, 405, tryUpdate(s, "GET", "/update/revert", "", "", nil).Code)
	require.Equal(t, 403, tryUpdate(s, "GET", "/update/commit", "", "", func(r *http.Request) { r.Header.Set("Referer", "http://evil.example/") }).Code)
}

// Who may not install does not get a byte of a file read.
func TestUploadRights(t *testing.T) {
	d := newFake()
	lines := ""
	for _, u := range []string{"op", "admin"} {
		l, err := HashPassword(SHA256, u, "RPC", "secret")
		require.NoError(t, err)
		lines += l + "\n"
	}
	s := newTest(t, d, withUsers(t, lines, func(o *AccessOptions) {
		o.Rights = map[string][]Right{"op": {Read, Operate}, "admin": {Install}}
	}))
	body, kind := form(t, "@file", "firmware")
	ask := func(user, path string) (int, bool) {
		read := false
		var header string
		for {
			w := tryUpdate(s, "POST", path, kind, "", func(r *http.Request) {
				in := strings.NewReader(body)
				r.Body = io.NopCloser(readerFunc(func(b []byte) (int, error) { read = true; return in.Read(b) }))
				if path != "/update" {
					r.Body, r.ContentLength = http.NoBody, 0
					r.Header.Del("Content-Type")
				}
				if header != "" {
					r.Header.Set("Authorization", header)
				}
			})
			if w.Code != 401 || header != "" || user == "" {
				return w.Code, read
			}
			l := headerLogin{user: user, password: "secret"}
			require.True(t, l.challenged(w.Header()))
			header = l.header("POST", path)
		}
	}
	for _, c := range []struct {
		user, path string
		status     int
	}{
		{"", "/update", 401}, {"op", "/update", 403}, {"nobody", "/update", 401}, {"admin", "/update", 200},
		{"", "/update/commit", 401}, {"admin", "/update/commit", 403}, {"op", "/update/commit", 200},
		{"", "/update/revert", 401}, {"admin", "/update/revert", 403}, {"op", "/update/revert", 200},
	} {
		d.mu.Lock()
		d.calls = nil
		d.mu.Unlock()
		s.mu.Lock()
		s.due = time.Time{}
		s.mu.Unlock()
		status, read := ask(c.user, c.path)
		require.Equal(t, c.status, status, "%+v", c)
		require.Equal(t, status == 200, len(d.log()) == 1, "%+v", c)
		require.Equal(t, status == 200 && c.path == "/update", read, "%+v", c)
	}
}

// An upload takes as long as it takes, but a client that sends nothing is given up;
// so is one when the server is closed, or somebody calls OTA.End.
func TestUploadStalls(t *testing.T) {
	const head = "POST /update HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000\r\n\r\n" +
		"--x\r\nContent-Disposition: form-data; name=timeout\r\n\r\n30\r\n" +
		"--x\r\nContent-Disposition: form-data; name=f; filename=f\r\n\r\n"
	for name, c := range map[string]struct {
		act  func(*Server)
		want string
		took time.Duration
	}{
		"stalls": {func(*Server) {}, "-5 Update timed out", 90 * time.Second},
		"closed": {func(s *Server) { _ = s.Close() }, "the update was given up", time.Minute},
		"ended":  {func(s *Server) { _, _ = s.Call(context.Background(), testPeer, []byte(`{"id":1,"method":"OTA.End"}`)) }, "-13 Unexpected end of data", time.Minute},
	} {
		synctest.Test(t, func(t *testing.T) {
			d := newFake()
			s := newTest(t, d, nil)
			n := servePipes(t, NewHTTPServer(s.UpdateHandler()))
			start := time.Now()
			conn := n.send(t, head)
			for range 4 {
				_, err := fmt.Fprint(conn, "slow")
				require.NoError(t, err)
				time.Sleep(15 * time.Second)
			}
			c.act(s)
			status, body := readReply(t, conn, "POST")
			require.Contains(t, []int{500, 503}, status)
			require.Contains(t, body, c.want, name)
			// Then the client gets time to finish.
			require.WithinDuration(t, start.Add(c.took), time.Now(), 40*time.Second, name)
			require.Empty(t, s.pending)
		})
	}
}

// What comes before the file has a time limit, however slowly it comes, and ends
// with the server.
func TestUploadFormStalls(t *testing.T) {
	const head = "POST /update HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000\r\n\r\n"
	for begin, long := range map[string]string{
		"a head":  "--x\r\nContent-Disposition: form-data; name=",
		"a value": "--x\r\nContent-Disposition: form-data; name=timeout\r\n\r\n",
	} {
		for _, c := range []struct {
			close  bool
			status int
			want   string
			took   time.Duration
		}{
			{false, 400, "the form took too long", readTimeout},
			{true, 503, "the update was given up", 5 * time.Second},
		} {
			synctest.Test(t, func(t *testing.T) {
				s := newTest(t, newFake(), nil)
				n := servePipes(t, NewHTTPServer(s.UpdateHandler()))
				start := time.Now()
				conn := n.send(t, head+long)
				over := make(chan struct{})
				go func() {
					defer close(over)
					for {
						if _, err := conn.Write([]byte("1")); err != nil {
							return
						}
						time.Sleep(time.Second)
					}
				}()
				if c.close {
					time.Sleep(c.took)
					require.NoError(t, s.Close())
				}
				status, body := readReply(t, conn, "POST")
				require.Equal(t, c.status, status, begin)
				require.Contains(t, body, c.want, begin)
				// Then the client gets time to finish.
				require.WithinDuration(t, start.Add(c.took), time.Now(), readTimeout+5*time.Second, begin)
				require.NoError(t, conn.Close())
				<-over
				require.Empty(t, s.pending)
			})
		}
	}
}

// The end of the file stays its end.
func TestUploadReadOn(t *testing.T) {
	d := newFake()
	d.update = func(_ context.Context, r io.Reader) (ota.UpdateResult, error) {
		for range 3 {
			if _, err := io.Copy(io.Discard, r); err != nil {
				return ota.UpdateResult{}, err
			}
		}
		return ota.UpdateResult{}, nil
	}
	s := newTest(t, d, nil)
	body, kind := form(t, "@file", "firmware")
	require.Equal(t, "1 Update applied, rebooting\r\n", tryUpdate(s, "POST", "/update", kind, body, nil).Body.String())
}

// A browser gets its answer once it has sent everything, also if that was for
// nothing.
func TestUploadIsDrained(t *testing.T) {
	d := newFake()
	d.update = func(context.Context, io.Reader) (ota.UpdateResult, error) {
		return ota.UpdateResult{}, errors.New("no")
	}
	s := newTest(t, d, nil)
	srv := httptest.NewServer(s.UpdateHandler())
	defer srv.Close()
	body, kind := form(t, "@file", strings.Repeat("x", 8<<20))
	in := strings.NewReader(body)
	res, err := http.Post(srv.URL+"/update", kind, in)
	require.NoError(t, err)
	b, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	require.NoError(t, res.Body.Close())
	require.Equal(t, "-1 no\r\n", string(b))
	require.Zero(t, in.Len())
}
