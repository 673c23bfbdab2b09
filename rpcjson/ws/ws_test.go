package ws

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/rpcjson"
)

// What the genuine client sent, byte by byte, and what it got.
func TestVectors(t *testing.T) {
	var v struct {
		Cases []struct {
			Name     string
			Request  string `json:"handshake_request"`
			Response string `json:"handshake_response"`
			Frames   []struct {
				Dir     string
				Opcode  byte
				Payload string
				RPC     string
				Note    string `json:"reply_note"`
				Wire    []byte `json:"wire_b64"`
			}
		}
	}
	readVectors(t, "../testdata/websocket.json", &v)
	require.Len(t, v.Cases, 5)
	for _, c := range v.Cases {
		t.Run(c.Name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				srv := canned(t, nil)
				// The answers of the device to what follows, in order.
				answers := map[string][]string{}
				rpc := ""
				for _, f := range c.Frames {
					if f.RPC != "" {
						rpc = f.RPC
					} else if f.Dir == "device_to_client" {
						answers[rpc] = append(answers[rpc], f.Payload)
					}
				}
				var mu sync.Mutex
				for method := range answers {
					if method == "Nope" {
						continue
					}
					handle(t, srv, method, func(context.Context, *rpcjson.Request) (any, error) {
						mu.Lock()
						defer mu.Unlock()
						var reply struct {
							Result json.RawMessage
							Error  *rpcjson.Error
						}
						if err := json.Unmarshal([]byte(answers[method][0]), &reply); err != nil {
							return nil, err
						}
						answers[method] = answers[method][1:]
						if reply.Error != nil {
							return nil, reply.Error
						}
						return reply.Result, nil
					})
				}
				n := serve(t, handler(t, srv, nil))
				conn, err := n.dial(t.Context(), "", "")
				require.NoError(t, err)
				w := upgraded(t, conn, c.Request)
				want, err := http.ReadResponse(bufio.NewReader(strings.NewReader(c.Response)), nil)
				require.NoError(t, err)
				require.Equal(t, want.Status, w.res.Status)
				w.res.Header.Del("Date")
				require.Equal(t, want.Header, w.res.Header)
				for _, f := range c.Frames {
					if f.Dir == "client_to_device" {
						w.send(string(f.Wire))
						continue
					}
					wire, _, payload, err := w.frame()
					require.NoError(t, err)
					require.Equal(t, f.Payload, payload)
					require.Equal(t, f.Wire, wire)
				}
				w.closed(1000)
			})
		})
	}
}

// The same whole update into a real device.
func TestVectorsDevice(t *testing.T) {
	var v struct {
		Cases []struct {
			Name    string
			Request string `json:"handshake_request"`
			Frames  []struct {
				Dir, RPC string
				Opcode   byte
				Wire     []byte `json:"wire_b64"`
			}
		}
	}
	readVectors(t, "../testdata/websocket.json", &v)
	b := newBoard(t, 256<<10)
	web := httptest.NewServer(handler(t, b.srv, nil))
	defer web.Close()
	for _, c := range v.Cases {
		if c.Name != "ota/full" {
			continue
		}
		conn, err := net.Dial("tcp", web.Listener.Addr().String())
		require.NoError(t, err)
		w := upgraded(t, conn, c.Request)
		var last string
		for _, f := range c.Frames {
			if f.Dir == "client_to_device" {
				w.send(string(f.Wire))
			} else {
				last = w.text()
				require.NotContains(t, last, `"error"`)
			}
		}
		require.Contains(t, last, `"result":{"state": 3, "message": "Update applied, rebooting", "is_committed": false, "progress_percent": 100, "commit_timeout": 300, "partition": 1}}`)
	}
	fs := make([]byte, 14)
	_, err := b.slots[1].Parts[1].Flash.ReadAt(fs, 0)
	require.NoError(t, err)
	require.Equal(t, "hello fs image", string(fs))
	<-b.resets
}

func TestFrameVectors(t *testing.T) {
	var v struct {
		Cases []struct {
			Name, Request string
			Reply         *string
			Closed        string `json:"non_persistent_channel"`
		}
	}
	readVectors(t, "../testdata/frames.json", &v)
	require.Len(t, v.Cases, 27)
	for _, c := range v.Cases {
		for _, opcode := range []byte{1, 2} {
			t.Run(fmt.Sprint(c.Name, opcode), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					srv := canned(t, nil)
					handle(t, srv, "OTA.Commit", func(context.Context, *rpcjson.Request) (any, error) { return nil, &rpcjson.Error{Code: -1} })
					if c.Name == "reboot-lockout" {
						reply, err := srv.Call(t.Context(), rpcjson.Peer{}, []byte(`{"id":1,"method":"Sys.Reboot","params":{"delay_ms":80}}`))
						require.NoError(t, err)
						require.Contains(t, string(reply), `"result":null`)
					}
					n := serve(t, handler(t, srv, nil))
					conn, err := n.dial(t.Context(), "", "")
					require.NoError(t, err)
					w := upgraded(t, conn, upgrade)
					require.Empty(t, w.res.Header.Get("Sec-WebSocket-Protocol"))
					w.send(message(opcode, true, c.Request))
					switch {
					case c.Closed != "":
						w.closed(1007)
						return
					case c.Reply != nil:
						require.Equal(t, *c.Reply, w.text())
					}
					if c.Name != "reboot-lockout" {
						w.send(message(1, true, getState))
						require.Equal(t, gotState, w.text(), "the next one, and nothing before it")
					}
				})
			})
		}
	}
}

func TestSubprotocol(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := serve(t, handler(t, canned(t, nil), nil))
		for _, c := range [][2]string{
			{"clubby.cesanta.com", "clubby.cesanta.com"},
			{"json-rpc, x", "json-rpc"},
			{"", ""},
			{",", ""},
		} {
			conn, err := n.dial(t.Context(), "", "")
			require.NoError(t, err)
			w := upgraded(t, conn, strings.Replace(upgrade, "\r\n\r\n", "\r\nSec-WebSocket-Protocol: "+c[0]+"\r\n\r\n", 1))
			require.Equal(t, 101, w.res.StatusCode)
			require.Equal(t, c[1], w.res.Header.Get("Sec-WebSocket-Protocol"))
			w.send(message(1, true, getState))
			require.Equal(t, gotState, w.text())
		}
	})
}

// hijackable is an http.ResponseWriter for upgrades without a network.
type hijackable struct {
	*httptest.ResponseRecorder
	conn net.Conn
}

func (h *hijackable) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return h.conn, bufio.NewReadWriter(bufio.NewReader(h.conn), bufio.NewWriter(h.conn)), nil
}

// Requests that a web page can cause: none of a foreign one gets a connection,
// and all others get the answer that they would without WebSocket.
func TestBrowserCorpus(t *testing.T) {
	var cases []struct {
		Method, Host, Path string
		Header             http.Header
		TLS                bool
		Status             int
	}
	readVectors(t, "../testdata/hostile/browser.json", &cases)
	require.Len(t, cases, 199)
	// try returns the status of the answer.
	try := func(t *testing.T, method, host, path string, header http.Header, secure bool) int {
		h := handler(t, canned(t, nil), nil)
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(getState))
		r.Method, r.Host = method, host
		if method == http.MethodPost {
			r.Header.Set("Content-Type", "application/json")
		}
		r.URL.Path, r.URL.RawQuery, _ = strings.Cut(path, "?")
		for k, vs := range header {
			r.Header[http.CanonicalHeaderKey(k)] = slices.Clone(vs)
		}
		if secure {
			r.TLS = &tls.ConnectionState{}
		}
		mine, theirs := net.Pipe()
		require.NoError(t, mine.Close()) // whoever gets it finds it closed
		w := &hijackable{httptest.NewRecorder(), theirs}
		h.ServeHTTP(w, r)
		return w.Code
	}
	ask := http.Header{"Connection": {"keep-alive, Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="}}
	recorded, refused, opened := 0, 0, 0
	for i, c := range cases {
		asks := strings.EqualFold(c.Header.Get("Upgrade"), "websocket")
		if asks {
			recorded++
		}
		synctest.Test(t, func(t *testing.T) {
			got := try(t, c.Method, c.Host, c.Path, c.Header, c.TLS)
			want := c.Status
			if asks && want == http.StatusMethodNotAllowed && (c.Path == "/rpc" || c.Path == "/rpc/" || c.Path == "/") {
				want = http.StatusSwitchingProtocols
			}
			if c.Status != 200 && c.Status != 204 || c.Path == "/rpc" { // other methods have no device here
				require.Equal(t, want, got, "%d: %+v", i, c)
			}
		})
		// The same origin asks for an upgrade.
		header := c.Header.Clone()
		if header == nil {
			header = http.Header{}
		}
		for k, v := range ask {
			header[k] = v
		}
		synctest.Test(t, func(t *testing.T) {
			got := try(t, http.MethodGet, c.Host, "/rpc", header, c.TLS)
			switch {
			case c.Method == http.MethodGet && header.Get("Referer") != "":
				// That counts only for methods called by GET.
			case c.Status == http.StatusForbidden:
				refused++
				require.Equal(t, http.StatusForbidden, got, "%d: %+v", i, c)
			default:
				opened++
				require.Equal(t, http.StatusSwitchingProtocols, got, "%d: %+v", i, c)
			}
		})
	}
	require.Greater(t, recorded, 8)
	require.Greater(t, refused, 50)
	require.Greater(t, opened, 30)
}

func TestUpgradeRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := serve(t, handler(t, canned(t, nil), nil))
		for _, c := range []struct {
			old, new string
			status   int
		}{
			{"Host: 127.0.0.1", "Host: evil.example", 403}, // a name that points here
			{"GET /rpc ", "GET /rpc/OTA.GetBootState ", 200},
			{"GET /rpc ", "GET /other ", 404},
			{"Version: 13", "Version: 8", 400},
			{"Key: dGhlIHNhbXBsZSBub25jZQ==", "Key: x", 400},
			{"Upgrade: websocket", "Upgrade: h2c", 405},
			{"Connection: Upgrade", "Connection: close", 405},
			{"\r\n\r\n", "\r\nOrigin: null\r\n\r\n", 403},
			{"\r\n\r\n", "\r\nOrigin: http://127.0.0.1\r\n\r\n", 101},
			{"\r\n\r\n", "\r\nOrigin: https://api.cesanta.com/\r\n\r\n", 101},
			{"\r\n\r\n", "\r\nOrigin: https://api.cesanta.com.evil.example\r\n\r\n", 403},
			{"\r\n\r\n", "\r\nSec-Fetch-Site: cross-site\r\n\r\n", 403},
		} {
			conn, err := n.dial(t.Context(), "", "")
			require.NoError(t, err)
			w := upgraded(t, conn, strings.Replace(upgrade, c.old, c.new, 1))
			require.Equal(t, c.status, w.res.StatusCode, "%s", c.new)
			require.NoError(t, conn.Close())
		}
	})
}

// The credentials of the handshake, or of the frame, decide each call.
func TestAuthorizer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var peers []rpcjson.Peer
		srv := canned(t, func(o *rpcjson.Options) {
			o.NoAuth = false
			o.Authorizer = rpcjson.AuthorizerFunc(func(_ context.Context, p *rpcjson.Peer, _ string, _ rpcjson.Right) error {
				peers = append(peers, *p)
				if p.Request.Header.Get("Authorization") == "Bearer secret" || string(p.Auth) == `{"k":1}` {
					return nil
				}
				return rpcjson.ErrUnauthenticated
			})
		})
		n := serve(t, handler(t, srv, nil))
		good := newClient(t, "ws://127.0.0.1", &DialOptions{Token: "secret", DialContext: n.dial}, nil)
		require.NoError(t, good.Call(t.Context(), "OTA.GetBootState", nil, nil))
		require.Equal(t, "WS_in", peers[0].Channel)
		require.NotNil(t, peers[0].Request)

		var e *rpcjson.Error
		bad := newClient(t, "ws://127.0.0.1", &DialOptions{Header: http.Header{"Authorization": {"Bearer x"}}, DialContext: n.dial}, nil)
		require.ErrorAs(t, bad.Call(t.Context(), "OTA.GetBootState", nil, nil), &e)
		require.Equal(t, 401, e.Code)

		conn, err := n.dial(t.Context(), "", "")
		require.NoError(t, err)
		w := upgraded(t, conn, upgrade)
		w.send(message(1, true, getState))
		require.Contains(t, w.text(), `"error":{"code":401`)
		w.send(message(1, true, strings.Replace(getState, `"id"`, `"auth":{"k":1},"id"`, 1)))
		require.Equal(t, gotState, w.text(), "refused calls leave the connection open")
	})
}

// What no message may be.
func TestHostileFrames(t *testing.T) {
	big := rpcjson.DefaultMaxFrame
	pad := func(n int) string { return getState + strings.Repeat(" ", n-len(getState)) }
	for _, c := range []struct {
		name, wire string
		code       int
	}{
		{"too long", message(1, true, pad(big+1)), 1009},
		{"too long in fragments", message(1, false, pad(big)) + message(0, true, " "), 1009},
		{"64-bit length", "\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00", 0},
		{"negative length", "\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00", 0},
		{"not masked", "\x81\x02{}", 0},
		{"reserved bits", "\xf1\x80\x00\x00\x00\x00", 1002},
		{"unknown opcode", "\x83\x80\x00\x00\x00\x00", 1002},
		{"continuation of nothing", message(0, true, getState), 1002},
		{"two messages at once", message(1, false, getState) + message(1, true, getState), 1002},
		{"long ping", message(9, true, strings.Repeat("x", 126)), 1002},
		{"ping in fragments", message(9, false, "x"), 1002},
		{"bad close", message(8, true, "x"), 1002},
		{"close with a bad code", message(8, true, "\x00\x01"), 1002},
		{"empty", message(1, true, ""), 1007},
		{"garbage", message(2, true, "\xff\xfe\x00"), 1007},
		{"HTTP", "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := handler(t, canned(t, nil), nil)
				n := serve(t, h)
				conn, err := n.dial(t.Context(), "", "")
				require.NoError(t, err)
				w := upgraded(t, conn, upgrade)
				go func() { _, _ = io.WriteString(w, c.wire) }()
				w.closed(c.code)
				require.NoError(t, conn.Close())
				synctest.Wait()
				require.Zero(t, h.conns)
				require.Empty(t, h.reading)
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		n := serve(t, handler(t, canned(t, nil), nil))
		conn, err := n.dial(t.Context(), "", "")
		require.NoError(t, err)
		w := upgraded(t, conn, upgrade)
		w.send(message(1, true, pad(big)))
		require.Equal(t, gotState, w.text(), "the longest")
		var b strings.Builder
		for i := range getState {
			b.WriteString(message(map[bool]byte{true: 1}[i == 0], false, getState[i:i+1]))
			b.WriteString(message(9, true, ""))
		}
		b.WriteString(message(0, true, ""))
		pongs := make(chan int, 1)
		go func() { _, _ = io.WriteString(w, b.String()) }()
		go func() {
			n := 0
			for {
				_, op, s, err := w.frame()
				if err != nil || op == 1 {
					if s != gotState {
						n = -1
					}
					pongs <- n
					return
				}
				n++
			}
		}()
		require.Equal(t, len(getState), <-pongs, "a message in fragments, with pings between them")
	})
}

// Random bytes after a handshake end the connection or are ignored; others are
// served meanwhile.
func TestGarbage(t *testing.T) {
	h := handler(t, canned(t, nil), nil)
	web := httptest.NewServer(h)
	defer web.Close()
	c := newClient(t, wsURL(web.URL), nil, nil)
	rnd := rand.NewChaCha8([32]byte{1})
	for range 100 {
		conn, err := net.Dial("tcp", web.Listener.Addr().String())
		require.NoError(t, err)
		w := upgraded(t, conn, upgrade)
		b := make([]byte, 2000)
		_, _ = rnd.Read(b)
		_, _ = w.Write(b)
		require.NoError(t, c.Call(t.Context(), "OTA.GetBootState", nil, nil))
		require.NoError(t, conn.Close())
	}
	require.Eventually(t, func() bool { h.mu.Lock(); defer h.mu.Unlock(); return h.conns == 1 }, 20*time.Second, time.Millisecond)
}

// A message that never ends, and a peer that takes no answers, are given up.
func TestSlowPeers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := canned(t, nil)
		h := handler(t, srv, nil)
		n := serve(t, h)
		conn, err := n.dial(t.Context(), "", "")
		require.NoError(t, err)
		w := upgraded(t, conn, upgrade)
		begun := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			w := message(1, true, getState)
			for i := range len(w) - 1 {
				if _, err := io.WriteString(conn, w[i:i+1]); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		})
		w.closed(0)
		wg.Wait()
		require.LessOrEqual(t, time.Since(begun), readTimeout+10*time.Second)
		synctest.Wait()
		require.Empty(t, h.reading)
		require.NoError(t, conn.Close())
	})
	synctest.Test(t, func(t *testing.T) {
		srv := canned(t, nil)
		answer(t, srv, "Big", `"`+strings.Repeat("x", 200_000)+`"`)
		h := handler(t, srv, nil)
		n := serve(t, h)
		conn, err := n.dial(t.Context(), "", "")
		require.NoError(t, err)
		w := upgraded(t, conn, upgrade)
		begun := time.Now()
		sent := 0
		for {
			if _, err := io.WriteString(w, message(1, true, `{"id":1,"method":"Big"}`)); err != nil {
				break
			}
			sent++
		}
		require.LessOrEqual(t, time.Since(begun), 2*writeTimeout+time.Second)
		require.LessOrEqual(t, sent, 2*DefaultMaxPending, "no more is taken in")
		synctest.Wait()
		require.Zero(t, h.conns)
	})
}

// Peers that are slow with long messages do not keep others from being served, nor
// does who waits behind them get lost.
func TestSlowPeersAndOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := handler(t, canned(t, nil), nil)
		n := serve(t, h)
		connect := func() *raw {
			conn, err := n.dial(t.Context(), "", "")
			require.NoError(t, err)
			return upgraded(t, conn, upgrade)
		}
		long := message(1, true, strings.Repeat(" ", 9000)+getState)
		other, waiting := connect(), connect()
		const slow = 4 * maxReading
		var slowly sync.WaitGroup
		for range slow {
			w := connect()
			slowly.Go(func() { _, _ = io.WriteString(w, long[:8000]) }) // given up some time
		}
		synctest.Wait()
		require.Len(t, h.reading, maxReading)
		begun := time.Now()
		other.send(message(1, true, getState))
		require.Equal(t, gotState, other.text())
		require.Zero(t, time.Since(begun), "a short message waits for nobody")

		var wg sync.WaitGroup
		wg.Go(func() { _, _ = io.WriteString(waiting, long) }) // the reply tells
		require.Equal(t, gotState, waiting.text())
		wg.Wait()
		slowly.Wait()
		require.Equal(t, slow/maxReading*readTimeout, time.Since(begun))
		require.NoError(t, other.Close())
		require.NoError(t, waiting.Close())
		synctest.Wait()
		require.Empty(t, h.reading)
	})
}

func TestIdleAndPing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := handler(t, canned(t, nil), &Options{IdleTimeout: 90 * time.Second})
		n := serve(t, h)
		conn, err := n.dial(t.Context(), "", "")
		require.NoError(t, err)
		w := upgraded(t, conn, upgrade)
		begun := time.Now()
		pings := 0
		for {
			_, op, s, err := w.frame()
			require.NoError(t, err)
			if op == 8 {
				require.Equal(t, "\x03\xe8idle", s)
				break
			}
			require.EqualValues(t, 9, op)
			if pings++; pings == 1 {
				w.send(message(1, true, getState)) // not idle yet
				w.send(message(10, true, s))
				require.Equal(t, gotState, w.text())
				continue
			}
			w.send(message(10, true, s))
		}
		require.Equal(t, 120*time.Second, time.Since(begun))
		require.NoError(t, conn.Close())

		// One who does not answer.
		conn, err = n.dial(t.Context(), "", "")
		require.NoError(t, err)
		w = upgraded(t, conn, upgrade)
		begun = time.Now()
		_, err = io.Copy(io.Discard, w.r)
		require.NoError(t, err)
		require.InDelta(t, 60, time.Since(begun).Seconds(), 2)
		require.NoError(t, conn.Close())
		synctest.Wait()
		require.Zero(t, h.conns)
	})
}

func TestLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := canned(t, nil)
		gate := make(chan struct{})
		handle(t, srv, "Wait", func(ctx context.Context, _ *rpcjson.Request) (any, error) {
			select {
			case <-gate:
				return nil, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		})
		h := handler(t, srv, &Options{MaxConns: 2, MaxPending: 3})
		n := serve(t, h)
		var ws []*raw
		for range 3 {
			conn, err := n.dial(t.Context(), "", "")
			require.NoError(t, err)
			ws = append(ws, upgraded(t, conn, upgrade))
		}
		require.Equal(t, 101, ws[0].res.StatusCode)
		require.Equal(t, 101, ws[1].res.StatusCode)
		require.Equal(t, 503, ws[2].res.StatusCode)
		w := ws[0]
		for i := range 5 {
			w.send(message(1, true, fmt.Sprintf(`{"id":%d,"method":"Wait"}`, i)))
			if i >= 3 {
				require.Equal(t, fmt.Sprintf(`{"id":%d,"src":"esp32_123456","error":{"code":429,"message":"Request queue overflow"}}`, i), w.text())
			}
		}
		ws[1].send(message(1, true, getState))
		require.Equal(t, gotState, ws[1].text(), "others are not affected")
		close(gate)
		got := []string{w.text(), w.text(), w.text()}
		slices.Sort(got)
		require.Equal(t, `{"id":0,"src":"esp32_123456","result":null}`, got[0])
		w.send(message(1, true, getState))
		require.Equal(t, gotState, w.text())

		require.NoError(t, ws[1].Close())
		synctest.Wait()
		conn, err := n.dial(t.Context(), "", "")
		require.NoError(t, err)
		require.Equal(t, 101, upgraded(t, conn, upgrade).res.StatusCode, "there is room again")
	})
}

// Close says why, ends the contexts of calls, and lets nobody in afterwards.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := canned(t, nil)
		started, ended := make(chan struct{}), make(chan struct{})
		handle(t, srv, "Wait", func(ctx context.Context, _ *rpcjson.Request) (any, error) {
			close(started)
			<-ctx.Done()
			close(ended)
			return nil, ctx.Err()
		})
		h := handler(t, srv, nil)
		n := serve(t, h)
		conn, err := n.dial(t.Context(), "", "")
		require.NoError(t, err)
		w := upgraded(t, conn, upgrade)
		w.send(message(1, true, `{"id":1,"method":"Wait"}`))
		<-started
		go w.closed(1001)
		// A second one never answers.
		dead, err := n.dial(t.Context(), "", "")
		require.NoError(t, err)
		upgraded(t, dead, upgrade)
		begun := time.Now()
		require.NoError(t, h.Close())
		require.Less(t, time.Since(begun), 10*time.Second)
		<-ended
		require.NoError(t, h.Close())
		conn, err = n.dial(t.Context(), "", "")
		require.NoError(t, err)
		require.Equal(t, 503, upgraded(t, conn, upgrade).res.StatusCode)
	})
	// So does closing the server of the calls.
	synctest.Test(t, func(t *testing.T) {
		srv := canned(t, nil)
		n := serve(t, handler(t, srv, nil))
		conn, err := n.dial(t.Context(), "", "")
		require.NoError(t, err)
		w := upgraded(t, conn, upgrade)
		require.NoError(t, srv.Close())
		w.send(message(1, true, getState))
		w.closed(1001)
	})
}

func overflown(err error) bool {
	var e *rpcjson.Error
	return errors.As(err, &e) && e.Code == 429
}

// 200 connections ask while an update is running.
func TestManyConnections(t *testing.T) {
	const conns, rounds = 200, 10
	b := newBoard(t, 1<<20)
	zip := smallZip(t)
	web := httptest.NewServer(handler(t, b.srv, nil))
	defer web.Close()
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	goroutines, before := runtime.NumGoroutine(), heap()

	// The update never ends: the same bytes again and again.
	push, err := Dial(t.Context(), wsURL(web.URL), nil)
	require.NoError(t, err)
	pusher := rpcjson.NewClient(push, nil)
	require.NoError(t, pusher.Call(t.Context(), "OTA.Begin", map[string]any{"size": len(zip), "timeout": 600}, nil))
	ctx, stop := context.WithCancel(t.Context())
	var bg sync.WaitGroup
	var writes atomic.Int64
	chunk := map[string]any{"offset": 0, "data": base64.StdEncoding.EncodeToString(zip[:2000])}
	require.NoError(t, pusher.Call(ctx, "OTA.Write", chunk, nil))
	bg.Go(func() {
		for ctx.Err() == nil {
			err := pusher.Call(ctx, "OTA.Write", chunk, nil)
			switch {
			case err == nil:
				writes.Add(1)
			case !overflown(err) && ctx.Err() == nil:
				t.Errorf("write: %v", err)
				return
			}
		}
	})

	clients := make([]*rpcjson.Client, conns)
	for i := range clients {
		ch, err := Dial(t.Context(), wsURL(web.URL), nil)
		require.NoError(t, err)
		clients[i] = rpcjson.NewClient(ch, nil)
	}
	// First all at once: each gets a definite answer.
	var overflow atomic.Int64
	var wg sync.WaitGroup
	for _, c := range clients {
		wg.Go(func() {
			_, err := c.BootState(t.Context())
			switch {
			case overflown(err):
				overflow.Add(1)
			case err != nil:
				t.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
	// Then over all connections, some at a time.
	var mu sync.Mutex
	var took []time.Duration
	next := make(chan *rpcjson.Client)
	for range 16 {
		wg.Go(func() {
			for c := range next {
				begun := time.Now()
				_, err := c.BootState(t.Context())
				d := time.Since(begun)
				if err != nil {
					t.Errorf("%v", err)
				}
				mu.Lock()
				took = append(took, d)
				mu.Unlock()
			}
		})
	}
	for range rounds {
		for _, c := range clients {
			next <- c
		}
	}
	close(next)
	wg.Wait()
	during := heap()
	stop()
	bg.Wait()
	slices.Sort(took)
	median := took[len(took)/2]
	require.Len(t, took, conns*rounds)
	require.Less(t, overflow.Load(), int64(conns))
	require.Less(t, median, 100*time.Millisecond)
	require.NotZero(t, writes.Load(), "the update went on")
	for _, c := range append(clients, pusher) {
		require.NoError(t, c.Close())
	}
	web.Close()
	// The update that is still open has goroutines of its own.
	require.Eventually(t, func() bool { return runtime.NumGoroutine() <= goroutines+6 }, 20*time.Second, time.Millisecond)
	t.Logf("%d connections: median %v, max %v, %d of a burst answered 429, heap %d KiB before, %d KiB during, %d writes",
		conns, median, took[len(took)-1], overflow.Load(), before>>10, during>>10, writes.Load())
	require.Less(t, during, before+64<<20)
}

// doorman knows who opens a channel.
type doorman struct{ rpcjson.AuthorizerFunc }

func (doorman) Identify(_ context.Context, p *rpcjson.Peer) (string, error) {
	switch p.Request.Header.Get("Authorization") {
	case "":
		return "", nil
	case "Bearer secret":
		return "admin", nil
	}
	return "", rpcjson.ErrUnauthenticated
}

// Wrong credentials get no connection; right ones hold for all of its calls.
func TestAdmit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := canned(t, func(o *rpcjson.Options) {
			o.NoAuth = false
			o.Authorizer = doorman{func(_ context.Context, p *rpcjson.Peer, _ string, _ rpcjson.Right) error {
				if p.User != "admin" {
					return rpcjson.ErrForbidden
				}
				return nil
			}}
		})
		n := serve(t, handler(t, srv, nil))
		call := func(token string) error {
			c := newClient(t, "ws://127.0.0.1", &DialOptions{Token: token, DialContext: n.dial}, nil)
			return c.Call(t.Context(), "OTA.GetBootState", nil, nil)
		}
		require.NoError(t, call("secret"))
		var e *rpcjson.Error
		require.ErrorAs(t, call("wrong"), &e)
		require.Equal(t, 401, e.Code)
		require.ErrorAs(t, call(""), &e)
		require.Equal(t, 403, e.Code)
		for range 30 {
			require.Error(t, call("wrong"))
		}
		require.ErrorAs(t, call("wrong"), &e)
		require.Equal(t, 429, e.Code, "no more guesses")
	})
}
