package rpcjson_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/rpcjson"
)

// answer serves one fixed answer, in which ID stands for the id of the request.
// The request is left in *got.
func answer(t *testing.T, status int, body string, got *string) string {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		if got != nil {
			*got = r.Method + " " + r.URL.Path + " " + r.Header.Get("Authorization") + " " + r.Header.Get("Content-Type") + " " + string(b)
		}
		var f struct{ ID json.Number }
		_ = json.Unmarshal(b, &f)
		w.Header().Set("Location", "http://127.0.0.1:1/elsewhere")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, strings.ReplaceAll(body, "ID", f.ID.String()))
	}))
	t.Cleanup(web.Close)
	return web.URL
}

func dial(t *testing.T, url string, o *rpcjson.ClientOptions) *rpcjson.Client {
	c, err := rpcjson.Dial(t.Context(), url, o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

func TestClientCall(t *testing.T) {
	for _, c := range []struct {
		name, body string
		status     int
		result     string // JSON
		err        error  // for errors.Is
		remote     rpcjson.Error
	}{
		{name: "result", status: 200, body: `{"id":ID,"src":"d","dst":"ota","result":{"a": 1}}` + "\r\n", result: `{"a": 1}`},
		{name: "null", status: 200, body: `{"id":ID,"result":null}`, result: `null`},
		{name: "id as string", status: 200, body: `{"id":"ID","result":true}`, result: `true`},
		{name: "code 0 is success", status: 200, body: `{"id":ID,"error":{"code":0,"message":"Update applied, finalizing"}}`},
		{name: "error", status: 200, body: `{"id":ID,"error":{"code":-1,"message":"no"}}`, remote: rpcjson.Error{Code: -1, Message: "no"}},
		{name: "error without message", status: 200, body: `{"id":ID,"error":{"code":-1}}`, remote: rpcjson.Error{Code: -1}},
		{name: "another call's", status: 200, body: `{"id":7,"result":true}`, err: rpcjson.ErrBadReply},
		{name: "not JSON", status: 200, body: `hello`, err: rpcjson.ErrBadReply},
		{name: "empty", status: 200, err: rpcjson.ErrBadReply},
		{name: "too long", status: 200, body: `{"id":ID,"result":"` + strings.Repeat("x", 3000) + `"}`, err: ota.ErrTooLarge},
		{name: "error object", status: 401, body: `{"code":401,"message":"who?"}`, remote: rpcjson.Error{Code: 401, Message: "who?"}},
		{name: "plain text", status: 400, body: "Invalid request", remote: rpcjson.Error{Code: 400, Message: `HTTP status 400 Bad Request: "Invalid request"`}},
		{name: "redirect", status: 307, remote: rpcjson.Error{Code: 307, Message: "HTTP status 307 Temporary Redirect"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got string
			cl := dial(t, answer(t, c.status, c.body, &got), &rpcjson.ClientOptions{Token: "secret", MaxReply: 2000})
			var res json.RawMessage
			err := cl.Call(t.Context(), "OTA.Update", map[string]string{"url": "http://h/?a=1&b=<>"}, &res)
			var remote *rpcjson.Error
			switch {
			case c.remote != (rpcjson.Error{}):
				require.ErrorAs(t, err, &remote)
				require.Equal(t, c.remote.Code, remote.Code)
				require.Equal(t, c.remote.Message, remote.Message)
				require.NotErrorIs(t, err, rpcjson.ErrNoReply)
			case c.err != nil:
				require.ErrorIs(t, err, c.err)
				require.NotErrorIs(t, err, rpcjson.ErrNoReply)
				require.NotErrorAs(t, err, &remote)
			default:
				require.NoError(t, err)
				require.Equal(t, c.result, string(res))
			}
			require.Regexp(t, `^POST /rpc Bearer secret application/json \{"src":"ota","id":[12][0-9]{12},"method":"OTA.Update","params":\{"url":"http://h/\?a=1&b=<>"\}\}\n$`, got)
		})
	}
}

func TestClientFrames(t *testing.T) {
	var got string
	url := answer(t, 200, `{"id":ID,"result":null}`, &got)
	require.NoError(t, dial(t, url+"/some/where", nil).Call(t.Context(), "A.B", nil, nil))
	require.Regexp(t, `^POST /some/where  application/json \{"src":"ota","id":[0-9]+,"method":"A.B"\}\n$`, got)
	c := dial(t, url, &rpcjson.ClientOptions{CompatArgs: true})
	require.NoError(t, c.Call(t.Context(), "A.B", []int{1}, nil))
	require.Regexp(t, `,"method":"A.B","args":\[1\]\}\n$`, got)
	require.ErrorIs(t, c.Call(t.Context(), "A.B", func() {}, nil), ota.ErrInvalid)
	var n int
	require.ErrorIs(t, dial(t, answer(t, 200, `{"id":ID,"result":"x"}`, nil), nil).Call(t.Context(), "A.B", nil, &n), rpcjson.ErrBadReply)
}

func TestDialRefuses(t *testing.T) {
	for _, url := range []string{"", "://", "http://", "http://user:secret@h", "ftp://h", "unix://", "unix://host/x", "h:80"} {
		_, err := rpcjson.Dial(t.Context(), url, nil)
		require.ErrorIs(t, err, ota.ErrInvalid, url)
		require.NotContains(t, err.Error(), "secret")
	}
}

func TestClientNoReply(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	closed := "http://" + l.Addr().String()
	require.NoError(t, l.Close())
	err = dial(t, closed, nil).Call(t.Context(), "A.B", nil, nil)
	require.ErrorIs(t, err, rpcjson.ErrNoReply)
	var oe *net.OpError
	require.ErrorAs(t, err, &oe)
	require.Equal(t, "dial", oe.Op)

	end := make(chan struct{})
	slow := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-end }))
	defer slow.Close()
	defer close(end)
	err = dial(t, slow.URL, &rpcjson.ClientOptions{Timeout: 50 * time.Millisecond}).Call(t.Context(), "A.B", nil, nil)
	require.ErrorIs(t, err, rpcjson.ErrNoReply)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// Over HTTP, plain and through a socket, a whole update of a real device.
func TestClientHTTP(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			b := newBoard(t)
			web := httptest.NewUnstartedServer(b.srv)
			if network == "unix" {
				dir, err := os.MkdirTemp("", "ota") // paths of sockets must be short
				require.NoError(t, err)
				t.Cleanup(func() { os.RemoveAll(dir) })
				web.Listener.Close()
				web.Listener, err = net.Listen("unix", filepath.Join(dir, "s"))
				require.NoError(t, err)
			}
			web.Start()
			defer web.Close()
			url := web.URL
			if network == "unix" {
				url = "unix://" + web.Listener.Addr().String()
			}
			c := dial(t, url, nil)
			zip := smallZip(t)
			require.NoError(t, c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), nil))
			st, err := c.Status(t.Context())
			require.NoError(t, err)
			require.Equal(t, rpcjson.StateSuccess, st.State)
			s, err := c.BootState(t.Context())
			require.NoError(t, err)
			require.Equal(t, ota.SlotID(1), s.Active)
			require.False(t, s.Committed)
		})
	}
}

var errCut = errors.New("the line was cut")

// line is a Channel to a server, on which things go wrong.
type line struct {
	mu  sync.Mutex
	srv *rpcjson.Server
	log []string
	// fault sees each call, numbered from 0, and says what goes wrong.
	fault func(i int, method string, frame []byte) fault
}

type fault uint8

const (
	none      fault = iota
	loseCall        // the device does not see it
	loseReply       // the device acts, but its answer is lost
	tooLarge        // refused with 413
	overload        // refused with 503
)

func (l *line) Close() error { return nil }

func (l *line) RoundTrip(ctx context.Context, frame []byte, _ int) ([]byte, error) {
	var f struct{ Method string }
	if err := json.Unmarshal(frame, &f); err != nil {
		return nil, err
	}
	l.mu.Lock()
	i := len(l.log)
	l.log = append(l.log, f.Method)
	what := none
	if l.fault != nil {
		what = l.fault(i, f.Method, frame)
	}
	srv := l.srv // a fault may be another device
	l.mu.Unlock()
	switch what {
	case loseCall:
		return nil, errCut
	case tooLarge:
		return nil, &rpcjson.Error{Code: 413, Message: "too large"}
	case overload:
		return nil, &rpcjson.Error{Code: 503, Message: "overload"}
	}
	b, err := srv.Call(ctx, rpcjson.Peer{Channel: "loopback"}, frame)
	if what == loseReply {
		return nil, errCut
	}
	return b, err
}

func (l *line) calls(method string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, m := range l.log {
		if m == method {
			n++
		}
	}
	return n
}

// wideLine is a line over which a push has several calls under way.
type wideLine struct{ *line }

func (wideLine) Window() int { return 9 }

// newWideLine returns a client of b, over a wideLine.
func newWideLine(b *board) (*rpcjson.Client, *line) {
	l := &line{srv: b.srv}
	return rpcjson.NewClient(wideLine{l}, nil), l
}

// newLine returns a client of b, over a line.
func newLine(b *board) (*rpcjson.Client, *line) {
	l := &line{srv: b.srv}
	return rpcjson.NewClient(l, nil), l
}

// installed requires that the device is about to try what is in the zip.
func (b *board) installed() {
	b.t.Helper()
	s, err := b.boot.Load(b.t.Context())
	require.NoError(b.t, err)
	require.Equal(b.t, ota.SlotID(1), s.Active)
	require.False(b.t, s.Committed)
	require.Len(b.t, s.Slots[1].Parts, 3)
	for i, p := range s.Slots[1].Parts {
		got := make([]byte, p.Size)
		_, err := b.slots[1].Parts[i].Flash.ReadAt(got, 0)
		require.NoError(b.t, err)
		require.Equal(b.t, p.SHA256, sha256.Sum256(got))
	}
}

// Whichever call goes wrong, in whichever way, the push succeeds.
func TestPushFaults(t *testing.T) {
	zip := smallZip(t)
	for i, what := range []fault{loseCall, loseReply, overload, loseCall, loseReply, overload} {
		for n, done := 0, false; !done; n++ {
			synctest.Test(t, func(t *testing.T) {
				b := newBoard(t)
				c, l := newLine(b)
				if i >= 3 {
					c, l = newWideLine(b)
				}
				hit := false
				l.fault = func(i int, method string, _ []byte) fault {
					// The first questions are not repeated: nothing is under way.
					if i == n+2 {
						hit = true
						return what
					}
					return none
				}
				require.NoError(t, c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{ChunkSize: 512}))
				b.installed()
				done = !hit
				if done {
					require.Equal(t, []int{1, 5, 1}, []int{l.calls("OTA.Begin"), l.calls("OTA.Write"), l.calls("OTA.End")})
					require.Greater(t, n, 6)
				}
			})
		}
	}
}

// Whichever two calls go wrong while several are under way, the push succeeds.
func TestPushWindowFaults(t *testing.T) {
	zip := smallZip(t)
	kinds := []fault{loseCall, loseReply, overload, tooLarge}
	for n := range 10 {
		for m := range n {
			for k := range len(kinds) * len(kinds) {
				synctest.Test(t, func(t *testing.T) {
					b := newBoard(t)
					c, l := newWideLine(b)
					l.fault = func(i int, method string, _ []byte) fault {
						what := none
						switch i {
						case m + 2:
							what = kinds[k/len(kinds)]
						case n + 2:
							what = kinds[k%len(kinds)]
						}
						if what == tooLarge && method != "OTA.Write" {
							what = none
						}
						return what
					}
					var last int64
					require.NoError(t, c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{
						ChunkSize: 512, Progress: func(done, _ int64) { last = done },
					}))
					require.EqualValues(t, len(zip), last)
					b.installed()
				})
			}
		}
	}
}

// A chunk is halved that has arrived after all, and the question where to go on goes
// wrong as well.
func TestPushHalvedFaults(t *testing.T) {
	zip := smallZip(t)
	for _, what := range []fault{none, loseCall, loseReply, overload} {
		synctest.Test(t, func(t *testing.T) {
			b := newBoard(t)
			c, l := newLine(b)
			faults := []fault{3: loseReply, tooLarge, none, what, none, what}
			l.fault = func(i int, method string, _ []byte) fault {
				if i < len(faults) {
					return faults[i]
				}
				return none
			}
			require.NoError(t, c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{ChunkSize: 512}))
			b.installed()
			require.Equal(t, "OTA.Begin", l.log[2])
			// A device that cannot be asked at all is given up in time.
			b = newBoard(t)
			c, l = newLine(b)
			l.fault = func(i int, method string, frame []byte) fault {
				switch {
				case i < 5:
					return faults[i]
				case bytes.Contains(frame, []byte("2147483647")):
					return what
				}
				return none
			}
			began := time.Now()
			err := c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{ChunkSize: 512})
			if what == none {
				require.NoError(t, err)
				return
			}
			require.Error(t, err)
			require.InDelta(t, time.Minute, time.Since(began), float64(10*time.Second))
		})
	}
}

// Half of everything gets lost.
func TestPushBadLine(t *testing.T) {
	for _, dial := range []func(*board) (*rpcjson.Client, *line){newLine, newWideLine} {
		synctest.Test(t, func(t *testing.T) {
			b := newBoard(t)
			c, l := dial(b)
			l.fault = func(i int, method string, _ []byte) fault {
				if i < 2 {
					return none
				}
				return []fault{loseReply, none, loseCall, none, none, loseReply, loseReply, none}[i%8]
			}
			zip := smallZip(t)
			var last int64
			o := &rpcjson.PushOptions{ChunkSize: 64, Progress: func(done, total int64) {
				require.Equal(t, int64(len(zip)), total)
				last = done
			}}
			require.NoError(t, c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), o))
			require.Equal(t, int64(len(zip)), last)
			b.installed()
		})
	}
}

// Chunks become smaller when the device says so, and when large ones get lost.
func TestPushSmallDevice(t *testing.T) {
	for i, what := range []fault{tooLarge, loseCall, tooLarge, loseCall} {
		synctest.Test(t, func(t *testing.T) {
			b := newBoard(t)
			c, l := newLine(b)
			if i >= 2 {
				c, l = newWideLine(b)
			}
			l.fault = func(_ int, _ string, frame []byte) fault {
				if len(frame) > 1000 {
					return what
				}
				return none
			}
			zip := smallZip(t)
			require.NoError(t, c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), nil))
			b.installed()
		})
	}
}

// A session that a killed client has left behind is refused, or continued.
func TestPushResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBoard(t)
		c, l := newLine(b)
		zip := smallZip(t)
		require.NoError(t, c.Call(t.Context(), "OTA.Begin", map[string]int{"size": len(zip)}, nil))
		require.NoError(t, c.Call(t.Context(), "OTA.Write", map[string]any{"offset": 0, "data": zip[:1000]}, nil))
		require.ErrorIs(t, c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), nil), ota.ErrBusy)
		require.NoError(t, c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{Resume: true}))
		require.Equal(t, 2, l.calls("OTA.Write"), "the first, and the rest: the status tells the offset")
		b.installed()
		require.ErrorIs(t, c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), nil), ota.ErrRebootPending)
	})
}

// A device that restarts in the middle gets everything once more.
func TestPushRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, fresh := newBoard(t), newBoard(t)
		c, l := newLine(b)
		l.fault = func(i int, _ string, _ []byte) fault {
			if i == 5 {
				l.srv = fresh.srv
			}
			return none
		}
		zip := smallZip(t)
		require.NoError(t, c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{ChunkSize: 512}))
		fresh.installed()
		b.untouchedBut("update")
	})
}

// untouchedBut is untouched, while an operation goes on.
func (b *board) untouchedBut(busy string) {
	b.t.Helper()
	require.Equal(b.t, busy, b.dev.Status().Busy)
	s, err := b.boot.Load(b.t.Context())
	require.NoError(b.t, err)
	require.Equal(b.t, ota.SlotID(0), s.Active)
	require.True(b.t, s.Committed)
}

// Giving up ends the session, so that the device is free at once.
func TestPushGivesUp(t *testing.T) {
	zip := smallZip(t)
	for _, c := range []struct {
		name string
		run  func(ctx context.Context, c *rpcjson.Client, cancel func()) error
		err  error
	}{
		{"cancelled", func(ctx context.Context, c *rpcjson.Client, cancel func()) error {
			return c.Push(ctx, bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{ChunkSize: 512, Progress: func(done, _ int64) {
				if done >= 1024 {
					cancel()
				}
			}})
		}, context.Canceled},
		{"unreadable", func(ctx context.Context, c *rpcjson.Client, _ func()) error {
			return c.Push(ctx, bytes.NewReader(zip[:2000]), int64(len(zip)), &rpcjson.PushOptions{ChunkSize: 512})
		}, io.ErrUnexpectedEOF},
		{"empty", func(ctx context.Context, c *rpcjson.Client, _ func()) error {
			return c.Push(ctx, bytes.NewReader(nil), 0, nil)
		}, ota.ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBoard(t)
				cl, _ := newWideLine(b)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				require.ErrorIs(t, c.run(ctx, cl, cancel), c.err)
				synctest.Wait()
				b.untouched()
				require.NoError(t, cl.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), nil))
				b.installed()
			})
		})
	}
}

// What the device refuses is not tried again.
func TestPushRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBoard(t)
		c, l := newLine(b)
		zip := smallZip(t)
		zip[1500] ^= 1
		err := c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), nil)
		var remote *rpcjson.Error
		require.ErrorAs(t, err, &remote)
		require.Equal(t, 1, l.calls("OTA.Begin"))
		require.LessOrEqual(t, l.calls("OTA.Write"), 1)
		b.untouched()
	})
}

// session is a device that is nothing but a push session, as the original has it.
type session struct {
	next  int64
	data  []byte
	begin string
	// odd, if not nil, may answer a write in its own way.
	odd func(s *session, off int64, data []byte) (err *rpcjson.Error, lost, handled bool)
	end *rpcjson.Error
	// answer, if not nil, may answer any call, with a result or an error.
	answer func(method string) (string, *rpcjson.Error)
}

func (s *session) Close() error { return nil }

func (s *session) RoundTrip(_ context.Context, frame []byte, _ int) ([]byte, error) {
	var f struct {
		ID     int64
		Method string
		Params json.RawMessage
	}
	if err := json.Unmarshal(frame, &f); err != nil {
		return nil, err
	}
	result := "null"
	var e *rpcjson.Error
	switch f.Method {
	case "OTA.Status":
		result = `{"state": 0, "message": "idle", "is_committed": true, "progress_percent": 0, "commit_timeout": 0, "partition": 0}`
	case "OTA.GetBootState":
		result = `{"active_slot": 0, "is_committed": true, "revert_slot": 0, "commit_timeout": 0}`
	case "OTA.Begin":
		s.begin = string(f.Params)
	case "OTA.End":
		e = s.end
	case "OTA.Write":
		var p struct {
			Offset int64
			Data   []byte
		}
		if err := json.Unmarshal(f.Params, &p); err != nil {
			return nil, err
		}
		var lost, handled bool
		if s.odd != nil {
			e, lost, handled = s.odd(s, p.Offset, p.Data)
		}
		if !handled {
			e = s.take(p.Offset, p.Data)
		}
		if lost {
			return nil, errCut
		}
	}
	if s.answer != nil {
		if r, err := s.answer(f.Method); r != "" || err != nil {
			result, e = r, err
		}
	}
	if e != nil {
		return fmt.Appendf(nil, `{"id":%d,"error":{"code":%d,"message":%q}}`, f.ID, e.Code, e.Message), nil
	}
	return fmt.Appendf(nil, `{"id":%d,"result":%s}`, f.ID, result), nil
}

func (s *session) take(off int64, data []byte) *rpcjson.Error {
	if off != s.next {
		return &rpcjson.Error{Code: -1, Message: fmt.Sprintf("Expected offset %d, got %d", s.next, off)}
	}
	s.data = append(s.data[:off], data...)
	s.next += int64(len(data))
	return nil
}

// Offsets other than the next are followed, within reason.
func TestPushOffsets(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 1000)
	n := 0
	var late []byte
	for _, c := range []struct {
		name string
		odd  func(s *session, off int64, data []byte) (*rpcjson.Error, bool, bool)
		err  string
	}{
		{name: "plain"},
		{name: "has forgotten some", odd: func(s *session, off int64, _ []byte) (*rpcjson.Error, bool, bool) {
			if n++; n == 5 {
				s.next -= 1500
			}
			return nil, false, false
		}},
		{name: "has more than was acknowledged", odd: func(s *session, off int64, b []byte) (*rpcjson.Error, bool, bool) {
			if n++; n == 3 || n == 4 {
				return s.take(off, b), true, true
			}
			return nil, false, false
		}},
		{name: "never acknowledges", odd: func(s *session, off int64, b []byte) (*rpcjson.Error, bool, bool) {
			return nil, off < 1<<30, false
		}},
		{name: "a long chunk arrives late", odd: func(s *session, off int64, b []byte) (*rpcjson.Error, bool, bool) {
			n++
			switch {
			case n <= 2:
				late = b
				return nil, true, true
			case n == 4: // after the probe
				e := s.take(0, late)
				if e == nil {
					e = &rpcjson.Error{Code: -1, Message: "offset 0 was already written with other data"}
				}
				return e, false, true
			}
			return nil, false, false
		}},
		{name: "never content", err: "Expected offset 0", odd: func(s *session, off int64, _ []byte) (*rpcjson.Error, bool, bool) {
			return &rpcjson.Error{Code: -1, Message: fmt.Sprintf("Expected offset 0, got %d", off)}, false, true
		}},
		{name: "wants what there is not", err: "Expected offset 99999", odd: func(s *session, off int64, _ []byte) (*rpcjson.Error, bool, bool) {
			return &rpcjson.Error{Code: -1, Message: fmt.Sprintf("Expected offset 99999, got %d", off)}, false, true
		}},
		{name: "never begins", err: "Update not started", odd: func(s *session, off int64, _ []byte) (*rpcjson.Error, bool, bool) {
			return &rpcjson.Error{Code: -1, Message: "Update not started"}, false, true
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n = 0
				s := &session{odd: c.odd}
				timeout, commit := 90*time.Second, 1500*time.Millisecond
				err := rpcjson.NewClient(s, nil).Push(t.Context(), bytes.NewReader(data), int64(len(data)),
					&rpcjson.PushOptions{ChunkSize: 1000, Timeout: &timeout, CommitTimeout: &commit})
				require.Equal(t, `{"timeout":90,"commit_timeout":2,"size":16000}`, s.begin)
				if c.err != "" {
					require.ErrorContains(t, err, c.err)
					return
				}
				require.NoError(t, err)
				require.Equal(t, data, s.data)
			})
		})
	}
	s := &session{end: &rpcjson.Error{Code: -1, Message: "-12 Invalid checksum"}}
	err := rpcjson.NewClient(s, nil).Push(t.Context(), bytes.NewReader(data), int64(len(data)), &rpcjson.PushOptions{Begin: json.RawMessage(`{"x":1}`)})
	require.ErrorContains(t, err, "-12 Invalid checksum")
	require.Equal(t, `{"x":1}`, s.begin)
}

// An unreachable device is waited for as long as the caller wants, and no longer.
func TestPushUnreachable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBoard(t)
		c, l := newLine(b)
		l.fault = func(i int, _ string, _ []byte) fault {
			if i >= 5 {
				return loseCall
			}
			return none
		}
		zip := smallZip(t)
		start := time.Now()
		err := c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{ChunkSize: 512, RetryFor: 30 * time.Second})
		require.ErrorIs(t, err, rpcjson.ErrNoReply)
		require.ErrorIs(t, err, errCut)
		require.InDelta(t, 30, time.Since(start).Seconds(), 6)
	})
}

// A device that is busy for long with the end of an update is asked now and then.
func TestPushEndSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ends []time.Duration
		s := &session{}
		start := time.Now()
		s.answer = func(method string) (string, *rpcjson.Error) {
			switch {
			case method == "OTA.End" && time.Since(start) < 3*time.Minute:
				ends = append(ends, time.Since(start))
				return "", &rpcjson.Error{Code: 503, Message: "busy"}
			case method == "OTA.Status" && len(ends) > 0:
				return `{"state": 1, "message": "progress", "is_committed": true, "progress_percent": 99}`, nil
			}
			return "", nil
		}
		require.NoError(t, rpcjson.NewClient(s, nil).Push(t.Context(), strings.NewReader("data"), 4, nil))
		require.LessOrEqual(t, time.Since(start), 3*time.Minute+2*time.Second)
		ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
		require.Equal(t, []time.Duration{0, ms(100), ms(300), ms(700), ms(1500), ms(3100), ms(5100), ms(7100)}, ends[:8])
		require.Less(t, len(ends), 100)
	})
}

// newPullLine returns a client of b, whose OTA.Update with a file opens what open
// returns.
func newPullLine(b *board, open func() (io.ReadCloser, error)) (*rpcjson.Client, *line) {
	policy := &bundle.Policy{AllowUnsigned: true}
	srv, err := rpcjson.New(b.dev, rpcjson.Options{ID: "d", NoAuth: true, Open: policy.Image,
		OpenFile: func(string) (io.ReadCloser, error) { return open() }})
	require.NoError(b.t, err)
	b.t.Cleanup(func() { require.NoError(b.t, srv.Close()) })
	l := &line{srv: srv}
	return rpcjson.NewClient(l, nil), l
}

// slowFile yields its content after a while.
type slowFile struct {
	io.Reader
	after time.Duration
}

func (f *slowFile) Read(p []byte) (int, error) {
	time.Sleep(f.after) // virtual
	f.after = 0
	return f.Reader.Read(p)
}

func (f *slowFile) Close() error { return nil }

func TestUpdate(t *testing.T) {
	zip := smallZip(t)
	bad := bytes.Clone(zip)
	bad[1500] ^= 1
	for _, c := range []struct {
		name   string
		zip    []byte
		takes  time.Duration
		fault  func(i int, method string) fault
		remote string // part of the message of the error
		err    error
		atMost time.Duration
	}{
		{name: "plain", zip: zip, atMost: time.Second},
		{name: "longer than a call may take", zip: zip, takes: 5 * time.Minute, atMost: 5*time.Minute + time.Second},
		{name: "refused", zip: bad, remote: "Invalid CRC", atMost: time.Second},
		{name: "reply lost", zip: zip, takes: 10 * time.Second, fault: func(_ int, m string) fault {
			if m == "OTA.Update" {
				return loseReply
			}
			return none
		}, atMost: 15 * time.Second},
		{name: "refusal lost", zip: bad, takes: 10 * time.Second, remote: "Invalid CRC", fault: func(_ int, m string) fault {
			if m == "OTA.Update" {
				return loseReply
			}
			return none
		}, atMost: 15 * time.Second},
		{name: "call lost", zip: zip, err: rpcjson.ErrUnknown, fault: func(_ int, m string) fault {
			if m == "OTA.Update" {
				return loseCall
			}
			return none
		}, atMost: 15 * time.Second},
		{name: "device lost", zip: zip, err: rpcjson.ErrNoReply, fault: func(i int, m string) fault {
			if i > 0 {
				return loseCall
			}
			return none
		}, atMost: 70 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBoard(t)
				cl, l := newPullLine(b, func() (io.ReadCloser, error) { return &slowFile{bytes.NewReader(c.zip), c.takes}, nil })
				if c.fault != nil {
					l.fault = func(i int, m string, _ []byte) fault { return c.fault(i, m) }
				}
				start := time.Now()
				err := cl.Update(t.Context(), &rpcjson.PullOptions{File: "fw.zip"})
				require.LessOrEqual(t, time.Since(start), c.atMost)
				var remote *rpcjson.Error
				switch {
				case c.err != nil:
					require.ErrorIs(t, err, c.err)
				case c.remote != "":
					require.ErrorAs(t, err, &remote)
					require.Contains(t, remote.Message, c.remote)
				default:
					require.NoError(t, err)
					b.installed()
				}
			})
		})
	}
}

// A device that never answers OTA.Update, as if the reply had been lost without the
// connection, does not make the client wait for ever.
func TestUpdateOverdue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBoard(t)
		cl, l := newPullLine(b, func() (io.ReadCloser, error) { return &slowFile{bytes.NewReader(smallZip(t)), time.Minute}, nil })
		l.fault = func(int, string, []byte) fault {
			select {
			case <-b.resets:
				l.srv = b.srv // has forgotten everything
			default:
			}
			return none
		}
		c := rpcjson.NewClient(hangLine{l}, nil)
		percent := -1.0
		start := time.Now()
		require.NoError(t, c.Update(t.Context(), &rpcjson.PullOptions{File: "x", Progress: func(p float64) { percent = p }}))
		require.InDelta(t, 60+20, time.Since(start).Seconds(), 5)
		require.GreaterOrEqual(t, percent, 0.0)
		b.installed()

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := cl.Update(ctx, nil)
		require.Error(t, err)
	})
}

// hangLine keeps the reply to OTA.Update back.
type hangLine struct{ *line }

func (h hangLine) RoundTrip(ctx context.Context, frame []byte, n int) ([]byte, error) {
	b, err := h.line.RoundTrip(ctx, frame, n)
	if bytes.Contains(frame, []byte(`"OTA.Update"`)) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return b, err
}

func ExampleDial() {
	ctx := context.Background()
	c, err := rpcjson.Dial(ctx, "http://192.168.1.5", &rpcjson.ClientOptions{Token: "…"})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	f, err := os.Open("fw.zip")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		fmt.Println(err)
		return
	}
	commit := 5 * time.Minute
	err = c.Push(ctx, f, info.Size(), &rpcjson.PushOptions{CommitTimeout: &commit})
	fmt.Println(err)
}

// scripted is a channel whose answers a function makes: the members of a reply
// beside the id.
type scripted func(ctx context.Context, method string) (string, error)

func (f scripted) RoundTrip(ctx context.Context, frame []byte, _ int) ([]byte, error) {
	var req struct {
		ID     json.Number
		Method string
	}
	if err := json.Unmarshal(frame, &req); err != nil {
		return nil, err
	}
	s, err := f(ctx, req.Method)
	return []byte(`{"id":` + req.ID.String() + `,` + s + `}`), err
}

func (scripted) Close() error { return nil }

// The oldest devices have no OTA.Status. Their reply comes when the update is over,
// long after the time limit of a call.
func TestUpdateWithoutStatus(t *testing.T) {
	for _, d := range []struct {
		lost bool
		want error
	}{{false, nil}, {true, rpcjson.ErrUnknown}} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			c := rpcjson.NewClient(scripted(func(ctx context.Context, method string) (string, error) {
				switch {
				case method == "OTA.GetBootState":
					return `"result":{"active_slot":0,"is_committed":true,"revert_slot":1,"commit_timeout":0}`, nil
				case method == "OTA.Status":
					return `"error":{"code":404,"message":"No handler for OTA.Status"}`, nil
				case d.lost:
					<-ctx.Done()
					return "", context.Cause(ctx)
				}
				select {
				case <-time.After(4 * time.Minute):
					return `"error":{"code":0,"message":"Update applied, finalizing"}`, nil
				case <-ctx.Done():
					return "", context.Cause(ctx)
				}
			}), nil)
			require.ErrorIs(t, c.Update(t.Context(), &rpcjson.PullOptions{URL: "http://h/fw.zip"}), d.want)
			require.Less(t, time.Since(start), 11*time.Minute)
		})
	}
}

// An update that the device refuses to begin has not been installed, even if the
// device starts another firmware for other reasons.
func TestUpdateRefusedBeforeReboot(t *testing.T) {
	for _, code := range []int{418, 429} {
		synctest.Test(t, func(t *testing.T) {
			active := 0
			c := rpcjson.NewClient(scripted(func(_ context.Context, method string) (string, error) {
				switch method {
				case "OTA.GetBootState":
					return fmt.Sprintf(`"result":{"active_slot":%d,"is_committed":true,"revert_slot":1,"commit_timeout":0}`, active), nil
				case "OTA.Status":
					return `"result":{"state":0,"message":"idle"}`, nil
				}
				active = 1 // somebody else's revert
				return fmt.Sprintf(`"error":{"code":%d,"message":"no"}`, code), nil
			}), nil)
			var e *rpcjson.Error
			require.ErrorAs(t, c.Update(t.Context(), &rpcjson.PullOptions{URL: "http://h/fw.zip"}), &e)
			require.Equal(t, code, e.Code)
		})
	}
}
