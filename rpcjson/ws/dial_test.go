package ws

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/rpcjson"
)

func TestDialErrors(t *testing.T) {
	for _, u := range []string{"", "http://x/", "ws://", "ws:///rpc", "ws://u:p@x/", "wss://\x7f/", "mqtt://x/y"} {
		_, err := Dial(t.Context(), u, nil)
		require.ErrorIs(t, err, ota.ErrInvalid, "%q", u)
		require.NotContains(t, err.Error(), "u:p")
		err = Connect(t.Context(), nil, u, nil)
		require.ErrorIs(t, err, ota.ErrInvalid, "%q", u)
	}
	require.ErrorIs(t, Connect(t.Context(), nil, "ws://x", &ConnectOptions{MinDelay: time.Minute, MaxDelay: time.Second}), ota.ErrInvalid)
}

func TestClient(t *testing.T) {
	srv := canned(t, nil)
	web := httptest.NewServer(handler(t, srv, nil))
	defer web.Close()
	answer(t, srv, "Big", `"`+strings.Repeat("x", 5000)+`"`)
	c := newClient(t, wsURL(web.URL), nil, &rpcjson.ClientOptions{MaxReply: 4096})
	st, err := c.BootState(t.Context())
	require.NoError(t, err)
	require.True(t, st.Committed)
	var e *rpcjson.Error
	require.ErrorAs(t, c.Call(t.Context(), "Nope", nil, nil), &e)
	require.Equal(t, 404, e.Code)
	require.ErrorIs(t, c.Call(t.Context(), "Big", nil, nil), ota.ErrTooLarge)
	require.NoError(t, c.Call(t.Context(), "OTA.GetBootState", nil, nil), "over a new connection")

	// Calls do not wait for each other.
	gate := make(chan struct{})
	handle(t, srv, "Wait", func(context.Context, *rpcjson.Request) (any, error) { <-gate; return "late", nil })
	late := make(chan error, 1)
	go func() {
		var s string
		err := c.Call(t.Context(), "Wait", nil, &s)
		if err == nil && s != "late" {
			err = errors.New(s)
		}
		late <- err
	}()
	require.NoError(t, c.Call(t.Context(), "OTA.GetBootState", nil, nil))
	close(gate)
	require.NoError(t, <-late)

	// What is not there, and what is no WebSocket.
	for _, u := range []string{wsURL(web.URL) + "/rpc/RPC.List", wsURL(web.URL) + "/nope"} {
		c := newClient(t, u, nil, nil)
		err := c.Call(t.Context(), "OTA.GetBootState", nil, nil)
		if strings.HasSuffix(u, "nope") {
			require.ErrorAs(t, err, &e)
			require.Equal(t, "no such path", e.Message)
		}
		require.Error(t, err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, l.Close())
	err = newClient(t, "ws://"+l.Addr().String(), nil, nil).Call(t.Context(), "OTA.GetBootState", nil, nil)
	require.ErrorIs(t, err, rpcjson.ErrNoReply)
	var oe *net.OpError
	require.ErrorAs(t, err, &oe)
	require.Equal(t, "dial", oe.Op)

	require.NoError(t, c.Close())
	require.ErrorContains(t, c.Call(t.Context(), "OTA.GetBootState", nil, nil), "closed")
}

func TestRedirect(t *testing.T) {
	web := httptest.NewServer(http.RedirectHandler("http://evil.example/", http.StatusFound))
	defer web.Close()
	var e *rpcjson.Error
	err := newClient(t, wsURL(web.URL), &DialOptions{Token: "secret"}, nil).Call(t.Context(), "OTA.Status", nil, nil)
	require.ErrorAs(t, err, &e)
	require.Equal(t, 302, e.Code)
}

func TestTLS(t *testing.T) {
	web := httptest.NewUnstartedServer(handler(t, canned(t, nil), nil))
	web.Config.ErrorLog = log.New(io.Discard, "", 0)
	web.StartTLS()
	defer web.Close()
	url := wsURL(web.URL)
	require.True(t, strings.HasPrefix(url, "wss://"))
	cfg := web.Client().Transport.(*http.Transport).TLSClientConfig
	require.NoError(t, newClient(t, url, &DialOptions{TLS: cfg}, nil).Call(t.Context(), "OTA.GetBootState", nil, nil))
	require.ErrorContains(t, newClient(t, url, nil, nil).Call(t.Context(), "OTA.GetBootState", nil, nil), "certificate")
}

// Whatever a server sends, the call ends with an error and memory is bounded.
func TestClientHostileServer(t *testing.T) {
	for name, send := range map[string]func(ctx context.Context, c *websocket.Conn){
		"garbage": func(ctx context.Context, c *websocket.Conn) {
			_ = c.Write(ctx, websocket.MessageText, []byte("garbage"))
			_ = c.Write(ctx, websocket.MessageBinary, []byte(`{"id":1,"result":1}`))
			_ = c.Write(ctx, websocket.MessageText, []byte(`{"id":1,"method":"OTA.Revert"}`))
		},
		"too much": func(ctx context.Context, c *websocket.Conn) {
			_ = c.Write(ctx, websocket.MessageText, bytes.Repeat([]byte("x"), rpcjson.DefaultMaxReply+1))
		},
		"close": func(_ context.Context, c *websocket.Conn) {
			_ = c.Close(websocket.StatusInternalError, "no")
		},
		"silence": func(context.Context, *websocket.Conn) {},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					c, err := websocket.Accept(w, r, nil)
					if err != nil {
						t.Error(err)
						return
					}
					defer c.CloseNow()
					if _, _, err := c.Read(r.Context()); err != nil {
						return
					}
					send(r.Context(), c)
					_, _, _ = c.Read(r.Context())
				}))
				c := newClient(t, "ws://device", &DialOptions{DialContext: n.dial}, nil)
				begun := time.Now()
				err := c.Call(t.Context(), "OTA.GetBootState", nil, nil)
				if name == "too much" {
					require.ErrorIs(t, err, ota.ErrTooLarge)
				} else {
					require.ErrorIs(t, err, rpcjson.ErrNoReply)
				}
				require.LessOrEqual(t, time.Since(begun), rpcjson.DefaultCallTimeout)
				require.NoError(t, c.Close())
			})
		})
	}
}

// A server that has vanished without a word is noticed, and a new connection is
// made.
func TestClientPing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, over := true, make(chan struct{})
		h := handler(t, canned(t, nil), nil)
		n := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !first {
				h.ServeHTTP(w, r)
				return
			}
			first = false
			c, err := websocket.Accept(w, r, nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.CloseNow()
			<-over // reads nothing
		}))
		c := newClient(t, "ws://device", &DialOptions{DialContext: n.dial}, nil)
		tries := 0
		for begun := time.Now(); ; tries++ {
			err := c.Call(t.Context(), "OTA.GetBootState", nil, nil)
			if err == nil {
				break
			}
			require.ErrorIs(t, err, rpcjson.ErrNoReply)
			require.Less(t, time.Since(begun), time.Minute)
		}
		require.Positive(t, tries)
		require.NoError(t, c.Close())
		close(over)
	})
}

// Closing during a call, also one that opens the connection.
func TestClientClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := canned(t, nil)
		handle(t, srv, "Wait", func(ctx context.Context, _ *rpcjson.Request) (any, error) { <-ctx.Done(); return nil, ctx.Err() })
		n := serve(t, handler(t, srv, nil))
		for _, opened := range []bool{false, true} {
			c := newClient(t, "ws://device", &DialOptions{DialContext: n.dial}, nil)
			if opened {
				require.NoError(t, c.Call(t.Context(), "OTA.GetBootState", nil, nil))
			}
			done := make(chan error, 1)
			go func() { done <- c.Call(t.Context(), "Wait", nil, nil) }()
			synctest.Wait()
			require.NoError(t, c.Close())
			require.ErrorIs(t, <-done, rpcjson.ErrNoReply)
			require.NoError(t, c.Close())
		}
	})
}

// A push over connections that break all the time arrives whole.
func TestPushOverBrokenConnections(t *testing.T) {
	zip := smallZip(t)
	for _, limit := range []int64{900, 1500, 2500} {
		b := newBoard(t, 256<<10)
		web := httptest.NewServer(handler(t, b.srv, nil))
		way := newCutter(t, web.Listener.Addr().String(), limit)
		c := newClient(t, "ws://"+way.l.Addr().String(), nil, nil)
		var at []int64
		require.NoError(t, c.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{
			ChunkSize: 256, Progress: func(done, _ int64) { at = append(at, done) },
		}))
		require.Greater(t, way.connections(), 2)
		require.True(t, slices.IsSorted(at), "%v", at)
		fs := make([]byte, 14)
		_, err := b.slots[1].Parts[1].Flash.ReadAt(fs, 0)
		require.NoError(t, err)
		require.Equal(t, "hello fs image", string(fs))
		<-b.resets
		web.Close()
	}
}

// A push that was given up is resumed by another client where the device is.
func TestResume(t *testing.T) {
	zip := smallZip(t)
	b := newBoard(t, 256<<10)
	web := httptest.NewServer(handler(t, b.srv, nil))
	defer web.Close()
	way := newCutter(t, web.Listener.Addr().String(), 0)
	c := newClient(t, "ws://"+way.l.Addr().String(), nil, nil)
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	err := c.Push(ctx, bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{
		ChunkSize: 512, RetryFor: time.Millisecond,
		Progress: func(done, _ int64) {
			if done >= 1024 {
				way.end()
				cancel(gone)
			}
		},
	})
	require.ErrorIs(t, err, rpcjson.ErrNoReply)
	var from int64 = -1
	again := newClient(t, wsURL(web.URL), nil, nil)
	require.NoError(t, again.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{
		ChunkSize: 512, Resume: true,
		Progress: func(done, _ int64) {
			if from < 0 {
				from = done
			}
		},
	}))
	require.GreaterOrEqual(t, from, int64(1024))
	<-b.resets
}

// fleet is a server that devices connect to.
type fleet struct {
	mu    sync.Mutex
	times []time.Time
	hello []http.Header
	serve func(ctx context.Context, n int, c *websocket.Conn)
}

func (f *fleet) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	n := len(f.times)
	f.times = append(f.times, time.Now())
	f.hello = append(f.hello, r.Header)
	f.mu.Unlock()
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{"json-rpc"}})
	if err != nil {
		return
	}
	defer c.CloseNow()
	f.serve(r.Context(), n, c)
}

// ask makes one call.
func ask(ctx context.Context, c *websocket.Conn, frame string) (string, error) {
	if err := c.Write(ctx, websocket.MessageText, []byte(frame)); err != nil {
		return "", err
	}
	_, b, err := c.Read(ctx)
	return string(b), err
}

func TestConnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var peer rpcjson.Peer
		srv := canned(t, func(o *rpcjson.Options) {
			o.NoAuth = false
			o.Authorizer = rpcjson.AuthorizerFunc(func(_ context.Context, p *rpcjson.Peer, _ string, _ rpcjson.Right) error {
				peer = *p
				return nil
			})
		})
		const drops = 12
		f := &fleet{serve: func(ctx context.Context, n int, c *websocket.Conn) {
			// Broken frames are ignored.
			for _, bad := range []string{"garbage", "{}", `{"id":1,"dst":"other","method":"OTA.GetBootState"}`} {
				if err := c.Write(ctx, websocket.MessageText, []byte(bad)); err != nil {
					t.Error(err)
				}
			}
			got, err := ask(ctx, c, getState)
			if err != nil || got != gotState {
				t.Errorf("%q %v", got, err)
			}
			if n >= drops {
				_, _, _ = c.Read(ctx)
			}
		}}
		n := serve(t, f)
		ctx, cancel := context.WithCancelCause(t.Context())
		stopped := errors.New("stopped")
		done := make(chan error, 1)
		go func() {
			done <- Connect(ctx, srv, "ws://fleet.example/devices/42", &ConnectOptions{
				Dial: DialOptions{Token: "secret", DialContext: n.dial},
			})
		}()
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		f.mu.Lock()
		require.Len(t, f.times, drops+1)
		limit := 2 * time.Second
		for i := range drops {
			d := f.times[i+1].Sub(f.times[i]).Round(time.Millisecond)
			require.GreaterOrEqual(t, d, limit/2, "%d", i)
			require.LessOrEqual(t, d, limit, "%d", i)
			limit = min(2*limit, time.Minute)
		}
		require.Equal(t, "Bearer secret", f.hello[0].Get("Authorization"))
		require.Equal(t, "json-rpc", f.hello[0].Get("Sec-WebSocket-Protocol"))
		require.Empty(t, f.hello[0].Get("Origin"))
		f.mu.Unlock()
		require.Equal(t, "WS_out", peer.Channel)
		require.Equal(t, "fleet.example", peer.Addr)
		require.Nil(t, peer.Request)
		begun := time.Now()
		cancel(stopped)
		require.ErrorIs(t, <-done, stopped)
		require.Less(t, time.Since(begun), 10*time.Second)
	})
}

// A server that is down, refuses, or does not answer the handshake is tried
// again; after a connection that lasted the pauses start anew.
func TestConnectAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newPipeNet()
		lasted := 0
		f := &fleet{serve: func(ctx context.Context, _ int, c *websocket.Conn) {
			lasted++
			// Answers pings, for a while.
			ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
			defer cancel()
			_, _, _ = c.Read(ctx)
		}}
		var tries []time.Time
		refuse := func(ctx context.Context, network, addr string) (net.Conn, error) {
			tries = append(tries, time.Now())
			switch len(tries) {
			case 1, 2, 3, 4, 5:
				return nil, &net.OpError{Op: "dial", Net: network, Err: errors.New("refused")}
			case 6: // never answers
				a, b := net.Pipe()
				go func() { _, _ = io.Copy(io.Discard, b) }()
				return a, nil
			case 7: // no WebSocket
				a, b := net.Pipe()
				go func() {
					_, _ = b.Read(make([]byte, 4096))
					_, _ = io.WriteString(b, "HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
					b.Close()
				}()
				return a, nil
			}
			return n.dial(ctx, network, addr)
		}
		web := &http.Server{Handler: f}
		ended := make(chan error, 1)
		go func() { ended <- web.Serve(n) }()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- Connect(ctx, canned(t, nil), "ws://fleet", &ConnectOptions{Dial: DialOptions{DialContext: refuse}})
		}()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		require.GreaterOrEqual(t, len(tries), 9)
		require.GreaterOrEqual(t, lasted, 2)
		d := tries[8].Sub(tries[7])
		require.InDelta(t, 181.5, d.Seconds(), 1, "the pause is short again")
		cancel()
		require.ErrorIs(t, <-done, context.Canceled)
		require.NoError(t, web.Close())
		<-ended
	})
}

// Closing the server of the calls ends Connect.
func TestConnectClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := canned(t, nil)
		n := serve(t, &fleet{serve: func(ctx context.Context, _ int, c *websocket.Conn) {
			time.Sleep(time.Second)
			_, err := ask(ctx, c, getState)
			if websocket.CloseStatus(err) != websocket.StatusGoingAway {
				t.Errorf("%v", err)
			}
		}})
		done := make(chan error, 1)
		go func() {
			done <- Connect(t.Context(), srv, "ws://fleet", &ConnectOptions{Dial: DialOptions{DialContext: n.dial}})
		}()
		synctest.Wait()
		require.NoError(t, srv.Close())
		require.ErrorIs(t, <-done, rpcjson.ErrClosed)
	})
}
