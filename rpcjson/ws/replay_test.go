package ws

import (
	"context"
	"errors"
	"net/http/httptest"
	"testing"

	"github.com/coder/websocket"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/internal/replay"
	"github.com/slotota/ota/rpcjson"
)

// messages is a connection of a client.
type messages struct {
	ctx  context.Context
	c    *websocket.Conn
	kind websocket.MessageType
}

func (m messages) Send(frame []byte) error { return m.c.Write(m.ctx, m.kind, append(frame, '\n')) }

func (m messages) Recv() ([]byte, error) {
	ctx, cancel := context.WithTimeout(m.ctx, replay.Timeout)
	defer cancel()
	kind, b, err := m.c.Read(ctx)
	switch {
	case websocket.CloseStatus(err) == websocket.StatusInvalidFramePayloadData:
		err = replay.ErrClosed
	case err == nil && kind != websocket.MessageText:
		err = errors.New("a binary message")
	}
	return b, err
}

// What was recorded on any transport, over WebSocket.
func TestReplay(t *testing.T) {
	for name, kind := range map[string]websocket.MessageType{"text": websocket.MessageText, "binary": websocket.MessageBinary} {
		replay.Run(t, "../testdata", replay.Transport{Name: name, Closes: true, Serve: func(t *testing.T, srv *rpcjson.Server) func() (replay.Conn, error) {
			h := NewHandler(srv, nil)
			web := httptest.NewServer(h)
			t.Cleanup(func() {
				require.NoError(t, h.Close())
				web.Close()
			})
			return func() (replay.Conn, error) {
				c, _, err := websocket.Dial(t.Context(), wsURL(web.URL)+"/rpc", nil)
				if err != nil {
					return nil, err
				}
				t.Cleanup(func() { _ = c.CloseNow() })
				return messages{t.Context(), c, kind}, nil
			}
		}})
	}
}

// The same where the device has called a server, which keeps the connection
// whatever it is sent.
func TestReplayOutbound(t *testing.T) {
	replay.Run(t, "../testdata", replay.Transport{Name: "outbound", Serve: func(t *testing.T, srv *rpcjson.Server) func() (replay.Conn, error) {
		conns := make(chan *websocket.Conn)
		web := httptest.NewServer(&fleet{serve: func(ctx context.Context, _ int, c *websocket.Conn) {
			select {
			case conns <- c:
			case <-t.Context().Done():
			}
			<-t.Context().Done()
		}})
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- Connect(ctx, srv, wsURL(web.URL), nil) }()
		t.Cleanup(func() {
			cancel()
			require.ErrorIs(t, <-ended, context.Canceled)
			web.Close()
		})
		return func() (replay.Conn, error) {
			return messages{context.Background(), <-conns, websocket.MessageText}, nil
		}
	}})
}
