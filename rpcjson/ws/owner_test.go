package ws

import (
	"bytes"
	"context"
	"encoding/base64"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/rpcjson"
)

// A push session belongs to the connection that has begun it, and goes on over
// another one when that has broken.
func TestPushOwner(t *testing.T) {
	zip := smallZip(t)
	b := newBoard(t, 256<<10)
	web := httptest.NewServer(handler(t, b.srv, nil))
	defer web.Close()
	url := "ws" + strings.TrimPrefix(web.URL, "http")
	open := func() (*rpcjson.Client, *net.Conn) {
		var raw net.Conn
		c := newClient(t, url, &DialOptions{DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			raw, err = new(net.Dialer).DialContext(ctx, network, addr)
			return raw, err
		}}, nil)
		return c, &raw
	}
	write := func(c *rpcjson.Client, off, end int) error {
		return c.Call(t.Context(), "OTA.Write", map[string]any{"offset": off, "data": zip[off:end]}, nil)
	}
	first, raw := open()
	second, _ := open()
	require.NoError(t, first.Call(t.Context(), "OTA.Begin", map[string]int{"size": len(zip)}, nil))
	require.NoError(t, write(first, 0, 1000))
	var e *rpcjson.Error
	for range 2 {
		require.ErrorAs(t, write(second, 1000, 1500), &e)
		require.Equal(t, 503, e.Code)
		require.ErrorAs(t, second.Call(t.Context(), "OTA.End", nil, nil), &e)
		require.Equal(t, 503, e.Code)
	}
	require.NoError(t, write(first, 1000, 1500))
	require.NoError(t, (*raw).Close())
	require.NoError(t, second.Push(t.Context(), bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{Resume: true}))
	<-b.resets
}

// The same for a device that calls its server.
func TestPushOwnerOutbound(t *testing.T) {
	zip := smallZip(t)
	b := newBoard(t, 256<<10)
	conns := make(chan *websocket.Conn)
	done := make(chan struct{})
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		select {
		case conns <- c:
			<-done
		case <-done:
		}
		_ = c.CloseNow()
	}))
	defer web.Close()
	defer close(done)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Connect(ctx, b.srv, "ws"+strings.TrimPrefix(web.URL, "http"), &ConnectOptions{MinDelay: time.Millisecond, MaxDelay: 10 * time.Millisecond})
	}()
	ask := func(c *websocket.Conn, text string) string {
		require.NoError(t, c.Write(ctx, websocket.MessageText, []byte(text)))
		_, reply, err := c.Read(ctx)
		require.NoError(t, err)
		return string(reply)
	}
	first := <-conns
	require.Contains(t, ask(first, `{"id":1,"method":"OTA.Begin"}`), `"result":null`)
	require.NoError(t, first.CloseNow())
	second := <-conns
	require.Contains(t, ask(second, `{"id":1,"method":"OTA.Write","params":{"offset":0,"data":"`+base64.StdEncoding.EncodeToString(zip[:900])+`"}}`), `"result":null`)
	require.Contains(t, ask(second, `{"id":1,"method":"OTA.Write","params":{"offset":900,"data":"`+base64.StdEncoding.EncodeToString(zip[900:])+`"}}`), `"result":null`)
	require.Contains(t, ask(second, `{"id":1,"method":"OTA.End"}`), `"state": 3`)
	<-b.resets
	cancel()
	require.ErrorIs(t, <-ended, context.Canceled)
}
