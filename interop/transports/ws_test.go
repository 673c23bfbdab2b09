package transports_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/websocket"

	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/ws"
)

// serveWS serves a device over WebSocket and HTTP and returns its address.
func serveWS(t testing.TB, d *device) string {
	t.Helper()
	h := ws.NewHandler(d.srv, nil)
	web := httptest.NewServer(h)
	t.Cleanup(func() {
		require.NoError(t, h.Close())
		web.Close()
	})
	return web.Listener.Addr().String()
}

func TestWSMethods(t *testing.T) {
	d := newDevice(t, nil)
	addr := serveWS(t, d)
	everyMethod(t, genuine(t, "ws://"+addr+"/rpc", deadline), d)
}

// The credentials that the genuine client takes from the URL.
func TestWSCredentials(t *testing.T) {
	d := newDevice(t, func(o *rpcjson.Options) {
		o.NoAuth = false
		o.Authorizer = rpcjson.AuthorizerFunc(func(_ context.Context, p *rpcjson.Peer, _ string, _ rpcjson.Right) error {
			if p.Channel != "WS_in" || p.Request.Header.Get("Authorization") != "Bearer admin:secret" {
				return rpcjson.ErrUnauthenticated
			}
			return nil
		})
	})
	addr := serveWS(t, d)
	everyMethod(t, genuine(t, "ws://admin:secret@"+addr+"/rpc", deadline), d)

	d = newDevice(t, func(o *rpcjson.Options) {
		o.NoAuth = false
		o.Authorizer = rpcjson.AuthorizerFunc(func(context.Context, *rpcjson.Peer, string, rpcjson.Right) error { return rpcjson.ErrForbidden })
	})
	_, err := genuine(t, "ws://admin:wrong@"+serveWS(t, d)+"/rpc", deadline).CallRaw(t.Context(), "OTA.GetBootState", nil)
	require.ErrorContains(t, err, "remote error 403: unauthorized")
}

// wsFrame is a WebSocket frame on its way, unmasked.
type wsFrame struct {
	head    byte
	payload []byte
}

// frameWay is a way on which the frames of a client can be changed; change
// returns what is passed on instead.
func frameWay(t testing.TB, target string, change func(wsFrame) []wsFrame) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	serve := func(a net.Conn) {
		defer a.Close()
		b, err := net.Dial("tcp", target)
		if err != nil {
			return
		}
		defer b.Close()
		go func() {
			defer a.Close()
			_, _ = io.Copy(a, b)
		}()
		r := bufio.NewReader(a)
		req, err := http.ReadRequest(r)
		if err != nil || req.Write(b) != nil {
			return
		}
		for {
			f, err := readFrame(r)
			if err != nil {
				return
			}
			for _, g := range change(f) {
				if _, err := b.Write(g.wire()); err != nil {
					return
				}
			}
		}
	}
	go func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			go serve(a)
		}
	}()
	return l.Addr().String()
}

func readFrame(r *bufio.Reader) (f wsFrame, err error) {
	head := make([]byte, 2)
	if _, err = io.ReadFull(r, head); err != nil {
		return f, err
	}
	n := uint64(head[1] & 0x7f)
	if n >= 126 {
		ext := make([]byte, map[uint64]int{126: 2, 127: 8}[n])
		if _, err = io.ReadFull(r, ext); err != nil {
			return f, err
		}
		n = binary.BigEndian.Uint64(append(make([]byte, 8-len(ext)), ext...))
	}
	mask := make([]byte, 4)
	if _, err = io.ReadFull(r, mask); err != nil {
		return f, err
	}
	f.head, f.payload = head[0], make([]byte, n)
	_, err = io.ReadFull(r, f.payload)
	for i := range f.payload {
		f.payload[i] ^= mask[i&3]
	}
	return f, err
}

// wire returns the frame as a client sends it, with a mask of zeros.
func (f wsFrame) wire() []byte {
	b := []byte{f.head}
	switch n := len(f.payload); {
	case n < 126:
		b = append(b, 0x80|byte(n))
	case n < 1<<16:
		b = append(b, 0x80|126, byte(n>>8), byte(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 0x80|127), uint64(n))
	}
	b = append(b, 0, 0, 0, 0)
	return append(b, f.payload...)
}

// A whole push by the genuine client, undisturbed and with what may happen. It does
// not survive a broken connection: its OTA.End then waits for ever. Ours does, see
// the tests of package ws.
func TestWSPush(t *testing.T) {
	for name, what := range map[string]func(f wsFrame) []wsFrame{
		"undisturbed": func(f wsFrame) []wsFrame { return []wsFrame{f} },
		"failed write": func(f wsFrame) []wsFrame {
			f.payload = bytes.Replace(f.payload, []byte(`"offset":1024`), []byte(`"offset":1025`), 1)
			return []wsFrame{f}
		},
		"lost call": func(wsFrame) []wsFrame { return nil },
		"duplicate": func(f wsFrame) []wsFrame { return []wsFrame{f, f} },
		"fragments": func(f wsFrame) []wsFrame {
			a, b := f, f
			a.head &^= 0x80
			b.head = 0x80
			a.payload, b.payload = f.payload[:100], f.payload[100:]
			return []wsFrame{a, b}
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDevice(t, nil)
			var done atomic.Bool
			addr := frameWay(t, serveWS(t, d), func(f wsFrame) []wsFrame {
				if bytes.Contains(f.payload, []byte(`"offset":1024,`)) && done.CompareAndSwap(false, true) {
					return what(f)
				}
				return []wsFrame{f}
			})
			timeout := deadline
			if name == "lost call" {
				timeout = 5 * time.Second // to no reply
			}
			require.NoError(t, genuinePush(t, genuine(t, "ws://"+addr+"/rpc", timeout), smallZip, 512))
			require.True(t, done.Load())
			d.installed()
		})
	}
}

// Three failed writes end a push; the next one succeeds.
func TestWSPushGivenUp(t *testing.T) {
	d := newDevice(t, nil)
	var n atomic.Int32
	addr := frameWay(t, serveWS(t, d), func(f wsFrame) []wsFrame {
		if bytes.Contains(f.payload, []byte(`"offset":1024,`)) && n.Add(1) <= 3 {
			f.payload = bytes.Replace(f.payload, []byte(`"offset":1024`), []byte(`"offset":1025`), 1)
		}
		return []wsFrame{f}
	})
	conn := genuine(t, "ws://"+addr+"/rpc", deadline)
	require.ErrorContains(t, genuinePush(t, conn, smallZip, 512), "write failed at offset 1024")
	require.NoError(t, genuinePush(t, conn, smallZip, 512))
	d.installed()
}

// A device behind NAT calls a server that was made with the library of the
// genuine client, and that serves it as it wants.
func TestWSConnect(t *testing.T) {
	d := newDevice(t, nil)
	replies := make(chan string, 10)
	srv := &websocket.Server{Handler: func(c *websocket.Conn) {
		for i := range 2 {
			if err := websocket.Message.Send(c, fmt.Sprintf(`{"src":"fleet","id":%d,"method":"OTA.GetBootState"}`+"\n", i)); err != nil {
				return
			}
			var reply string
			if err := websocket.Message.Receive(c, &reply); err != nil {
				return
			}
			replies <- c.Request().URL.Path + " " + c.Request().Header.Get("Authorization") + " " + reply
		}
	}}
	web := httptest.NewServer(srv)
	defer web.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- ws.Connect(ctx, d.srv, "ws"+strings.TrimPrefix(web.URL, "http")+"/devices/42", &ws.ConnectOptions{
			Dial:     ws.DialOptions{Token: "t0ken"},
			MinDelay: 10 * time.Millisecond, MaxDelay: 100 * time.Millisecond,
		})
	}()
	const want = `/devices/42 Bearer t0ken {"id":%d,"src":"esp32_123456","dst":"fleet","result":{"active_slot": 0, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}}`
	for i := range 6 { // three connections
		select {
		case got := <-replies:
			require.Equal(t, fmt.Sprintf(want, i%2), got)
		case <-time.After(deadline):
			t.Fatal("no call came through")
		}
	}
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
}
