package rpcjson

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

// from is where a test calls from.
type from struct {
	channel, addr, user, src string
	conn                     chan struct{} // closed at its end; nil without
}

// ask calls a method of a push session and returns "ok" or the code.
func (f from) ask(t *testing.T, s *Server, method, params string) string {
	t.Helper()
	p := Peer{Channel: f.channel, Addr: f.addr, User: f.user, admitted: f.conn != nil, ended: f.conn}
	b, err := s.Call(t.Context(), p, fmt.Appendf(nil, `{"src":%q,"id":1,"method":"OTA.%s","params":%s}`, f.src, method, params))
	require.NoError(t, err)
	if e, err := parseReply(b, 1); err != nil {
		require.Nil(t, e)
		return fmt.Sprint(err.(*Error).Code)
	}
	return "ok"
}

// Who may go on with a push session, by what it was begun with, who comes, what has
// happened and how long it has been silent.
func TestPushOwner(t *testing.T) {
	conn := func() chan struct{} { return make(chan struct{}) }
	tcp := func(addr string) from { return from{channel: "TCP", addr: addr, conn: conn()} }
	const host, other = "10.0.0.2:", "10.0.0.3:"
	own := from{channel: "WS_in", addr: host + "1", conn: conn()}
	for _, c := range []struct {
		name       string
		begun, who from
		after      time.Duration // it may go on; negative: at once
		gone       time.Duration // the same, if the first connection has ended
	}{
		{"its connection", own, own, -1, -1},
		{"its connection, another src", own, from{channel: own.channel, addr: own.addr, src: "x", conn: own.conn}, -1, -1},
		{"another connection", tcp(host + "1"), tcp(host + "2"), takeoverIdle, -1},
		{"the same port again", tcp(host + "1"), tcp(host + "1"), takeoverIdle, -1},
		{"another host", tcp(host + "1"), tcp(other + "1"), takeoverForeign, takeoverForeign},
		{"another transport", tcp(host + "1"), from{channel: "HTTP", addr: host + "2"}, takeoverIdle, -1},
		{"a Unix socket", from{channel: "UNIX", addr: "@", conn: conn()}, from{channel: "UNIX", addr: "@", conn: conn()}, takeoverIdle, -1},
		{"not the network", from{channel: "UNIX", addr: "@", conn: conn()}, tcp(host + "1"), takeoverForeign, takeoverForeign},
		{"a server called", from{channel: "WS_out", addr: "fleet", conn: conn()}, from{channel: "WS_out", addr: "fleet", conn: conn()}, takeoverIdle, -1},
		{"the same user", from{channel: "TCP", addr: host + "1", user: "ann", conn: conn()}, from{channel: "WS_in", addr: other + "1", user: "ann", conn: conn()}, -1, -1},
		{"another user", from{channel: "TCP", addr: host + "1", user: "ann", conn: conn()}, from{channel: "TCP", addr: host + "2", user: "bob", conn: conn()}, takeoverForeign, takeoverForeign},
		{"another user over the same", from{channel: "TCP", addr: host + "1", user: "ann", conn: own.conn}, from{channel: "TCP", addr: host + "1", user: "bob", conn: own.conn}, takeoverForeign, takeoverForeign},
		{"nobody after a user", from{channel: "TCP", addr: host + "1", user: "ann", conn: conn()}, tcp(host + "2"), takeoverForeign, takeoverForeign},
		{"HTTP", from{channel: "HTTP", addr: host + "1"}, from{channel: "HTTP", addr: host + "2"}, -1, -1},
		{"HTTP another way", from{channel: "HTTP", addr: host + "1"}, from{channel: "HTTP", addr: "[fd00::2]:1"}, -1, -1},
		{"HTTP by another user", from{channel: "HTTP", addr: host + "1", user: "ann"}, from{channel: "HTTP", addr: host + "1", user: "bob"}, takeoverForeign, takeoverForeign},
		{"datagrams", from{channel: "UDP_in", addr: host + "1"}, from{channel: "UDP_in", addr: host + "1"}, -1, -1},
		{"datagrams, another port", from{channel: "UDP_in", addr: host + "1"}, from{channel: "UDP_in", addr: host + "2"}, takeoverIdle, takeoverIdle},
		{"datagrams, another host", from{channel: "UDP_in", addr: host + "1"}, from{channel: "UDP_in", addr: other + "1"}, takeoverForeign, takeoverForeign},
		{"MQTT", from{channel: "MQTT", addr: "b:1", src: "c1"}, from{channel: "MQTT", addr: "b:1", src: "c1"}, -1, -1},
		{"MQTT, another client", from{channel: "MQTT", addr: "b:1", src: "c1"}, from{channel: "MQTT", addr: "b:1", src: "c2"}, takeoverIdle, takeoverIdle},
	} {
		for _, ended := range []bool{false, true} {
			after := c.after
			if ended {
				if after = c.gone; c.begun.conn == nil || c.begun.conn == own.conn {
					continue
				}
			}
			t.Run(fmt.Sprintf("%s, ended %v", c.name, ended), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					d := newFake()
					s := newTest(t, d, nil)
					begun, who := c.begun, c.who
					shared := begun.conn != nil && begun.conn == who.conn
					if begun.conn != nil { // one of this bubble
						begun.conn = make(chan struct{})
					}
					if shared {
						who.conn = begun.conn
					} else if who.conn != nil {
						who.conn = make(chan struct{})
					}
					require.Equal(t, "ok", begun.ask(t, s, "Begin", `{}`))
					require.Equal(t, "ok", begun.ask(t, s, "Write", `{"offset":0,"data":"QUJD"}`))
					if ended {
						close(begun.conn)
					}
					if after >= 0 {
						if after > 0 {
							time.Sleep(after - 1)
						}
						require.Equal(t, "503", who.ask(t, s, "Write", `{"offset":3,"data":"eHh4"}`))
						require.Equal(t, "503", who.ask(t, s, "End", `{}`))
						require.Equal(t, "-1", who.ask(t, s, "Begin", `{}`), "busy")
						require.Equal(t, "ok", who.ask(t, s, "Status", `{}`))
						time.Sleep(time.Nanosecond)
					}
					require.Equal(t, "ok", who.ask(t, s, "Write", `{"offset":3,"data":"REVG"}`))
					if after >= 0 { // now it is that one's
						require.Equal(t, "503", begun.ask(t, s, "Write", `{"offset":6,"data":"eHh4"}`))
					}
					require.Equal(t, "ok", who.ask(t, s, "End", `{}`))
					require.Equal(t, "ok", begun.ask(t, s, "End", `{}`), "the result is nobody's secret")
					require.Equal(t, "ABCDEF", string(d.got))
				})
			})
		}
	}
}

// Of two clients that begin alike one goes on. The one that repeats its OTA.Begin
// gets the same answer.
func TestPushOwnerBegin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		a, b := from{channel: "HTTP", addr: "10.0.0.2:1"}, from{channel: "HTTP", addr: "10.0.0.3:1"}
		require.Equal(t, "ok", a.ask(t, s, "Begin", `{"size":6}`))
		require.Equal(t, "ok", a.ask(t, s, "Begin", `{"size":6}`))
		require.Equal(t, "503", b.ask(t, s, "Begin", `{"size":6}`))
		require.Equal(t, "-1", b.ask(t, s, "Begin", `{"size":7}`))
		first := from{channel: "TCP", addr: "10.0.0.2:1", conn: make(chan struct{})}
		require.Equal(t, "503", first.ask(t, s, "Begin", `{"size":6}`))
		time.Sleep(takeoverIdle)
		require.Equal(t, "ok", first.ask(t, s, "Begin", `{"size":6}`), "another transport of the same host")
		close(first.conn)
		again := from{channel: "TCP", addr: "10.0.0.2:2", conn: make(chan struct{})}
		require.Equal(t, "ok", again.ask(t, s, "Begin", `{"size":6}`), "over the next connection")
	})
}

// A call that takes long is no silence.
func TestPushOwnerBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		more := make(chan struct{})
		d.update = slowReader(more)
		s := newTest(t, d, nil)
		a := from{channel: "TCP", addr: "10.0.0.2:1", conn: make(chan struct{})}
		b := from{channel: "TCP", addr: "10.0.0.2:2", conn: make(chan struct{})}
		require.Equal(t, "ok", a.ask(t, s, "Begin", `{}`))
		var wg sync.WaitGroup
		wg.Go(func() { require.Equal(t, "ok", a.ask(t, s, "Write", `{"offset":0,"data":"QUJD"}`)) })
		time.Sleep(5 * time.Minute)
		require.Equal(t, "503", b.ask(t, s, "End", `{}`))
		close(more)
		wg.Wait()
		require.Equal(t, "503", b.ask(t, s, "End", `{}`))
		time.Sleep(takeoverIdle)
		require.Equal(t, "ok", b.ask(t, s, "End", `{}`))
	})
}

// Over real connections: what another connection says disturbs nothing, and the
// push goes on over a new one when the first has broken, or hangs.
func TestPushOwnerConnections(t *testing.T) {
	data := pushData(100_000)
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			d := newFake()
			s := newTest(t, d, nil)
			addr := "127.0.0.1:0"
			if network == "unix" {
				addr = filepath.Join(t.TempDir(), "s")
			}
			l, err := net.Listen(network, addr)
			require.NoError(t, err)
			ended := make(chan error, 1)
			ctx, cancel := context.WithCancel(t.Context())
			go func() { ended <- s.ServeListener(ctx, l, nil) }()
			open := func() (*Client, net.Conn) {
				conn, err := net.Dial(network, l.Addr().String())
				require.NoError(t, err)
				c := NewClient(NewStreamOf(conn, nil), nil)
				t.Cleanup(func() { c.Close() })
				return c, conn
			}
			write := func(c *Client, off, end int) error {
				return c.Call(t.Context(), "OTA.Write", map[string]any{"offset": off, "data": data[off:end]}, nil)
			}
			var e *Error
			first, raw := open()
			second, _ := open()
			require.NoError(t, first.Call(t.Context(), "OTA.Begin", nil, nil))
			require.NoError(t, write(first, 0, 1000))
			require.ErrorAs(t, write(second, 1000, 1001), &e)
			require.Equal(t, *errNotOwner, *e)
			require.ErrorAs(t, second.Call(t.Context(), "OTA.End", nil, nil), &e)
			require.Equal(t, *errNotOwner, *e)
			require.NoError(t, write(first, 1000, 2000))
			require.NoError(t, raw.Close())
			// It waits until the device has noticed, too.
			require.NoError(t, second.Push(t.Context(), bytes.NewReader(data), int64(len(data)), &PushOptions{Resume: true}))
			require.Equal(t, data, d.got)
			cancel()
			require.ErrorIs(t, <-ended, context.Canceled)
		})
	}
}

// The first connection hangs, as if the cable had been cut: the client that comes
// back waits ten seconds at most, or not at all if it shows who it is.
func TestPushOwnerHalfDead(t *testing.T) {
	for _, users := range []bool{false, true} {
		t.Run(fmt.Sprint("users ", users), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				data := pushData(100_000)
				d := newFake()
				s := newTest(t, d, nil)
				open := func() *Client {
					mine, theirs := net.Pipe()
					peer := Peer{Channel: "TCP", Addr: "10.0.0.2:" + fmt.Sprint(time.Now().UnixNano())}
					if users {
						peer.User = "ann"
					}
					go s.ServeStream(t.Context(), theirs, peer, nil)
					return NewClient(NewStream(func(context.Context) (io.ReadWriteCloser, error) { return mine, nil }, nil), nil)
				}
				first := open()
				require.NoError(t, first.Call(t.Context(), "OTA.Begin", nil, nil))
				require.NoError(t, first.Call(t.Context(), "OTA.Write", map[string]any{"offset": 0, "data": data[:1000]}, nil))
				second := open()
				start := time.Now()
				require.NoError(t, second.Push(t.Context(), bytes.NewReader(data), int64(len(data)), &PushOptions{Resume: true}))
				require.Equal(t, data, d.got)
				if users {
					require.Zero(t, time.Since(start))
				} else {
					require.GreaterOrEqual(t, time.Since(start), takeoverIdle)
					require.Less(t, time.Since(start), takeoverIdle+10*time.Second)
				}
				require.NoError(t, first.Close())
				require.NoError(t, second.Close())
				synctest.Wait()
			})
		})
	}
}

// Over HTTP each call has a connection of its own, as those of mos do.
func TestPushOwnerHTTP(t *testing.T) {
	d := newFake()
	s := newTest(t, d, nil)
	web := httptest.NewServer(s)
	defer web.Close()
	ports := map[string]bool{}
	call := func(text string) string {
		tr := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, addr)
			if err == nil {
				ports[c.LocalAddr().String()] = true
			}
			return c, err
		}}
		defer tr.CloseIdleConnections()
		res, err := (&http.Client{Transport: tr}).Post(web.URL+"/rpc", "application/json", strings.NewReader(text))
		require.NoError(t, err)
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		require.NoError(t, err)
		return string(b)
	}
	data := pushData(3000)
	require.Contains(t, call(`{"id":1,"method":"OTA.Begin"}`), `"result":null`)
	for off := 0; off < len(data); off += 1000 {
		require.Contains(t, call(fmt.Sprintf(`{"id":1,"method":"OTA.Write","params":{"offset":%d,"data":"%s"}}`,
			off, base64.StdEncoding.EncodeToString(data[off:off+1000]))), `"result":null`)
	}
	require.Contains(t, call(`{"id":1,"method":"OTA.End"}`), `"state": 3`)
	require.Equal(t, data, d.got)
	require.Len(t, ports, 5)
}

// slowReader is an update that reads once more chan has been closed.
func slowReader(more chan struct{}) func(context.Context, io.Reader) (ota.UpdateResult, error) {
	return func(_ context.Context, r io.Reader) (ota.UpdateResult, error) {
		b := make([]byte, 1)
		_, err := io.ReadFull(r, b)
		if err != nil {
			return ota.UpdateResult{}, err
		}
		<-more
		_, err = io.Copy(io.Discard, r)
		return ota.UpdateResult{Slot: 1}, err
	}
}
