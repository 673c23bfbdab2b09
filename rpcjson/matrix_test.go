package rpcjson_test

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/internal/authmatrix"
	"github.com/slotota/ota/rpcjson"
)

// Who may call what, over all that this package has itself.
func TestMatrix(t *testing.T) {
	authmatrix.Run(t, authmatrix.Transport{Name: "HTTP", HTTP: func(t *testing.T, srv *rpcjson.Server) (*http.Client, string) {
		web := httptest.NewServer(srv)
		t.Cleanup(web.Close)
		return web.Client(), web.URL + "/rpc"
	}})
	authmatrix.Run(t, authmatrix.Transport{Name: "HTTPS", HTTP: func(t *testing.T, srv *rpcjson.Server) (*http.Client, string) {
		web := httptest.NewTLSServer(srv)
		t.Cleanup(web.Close)
		return web.Client(), web.URL + "/rpc"
	}})
	authmatrix.Run(t, authmatrix.Transport{Name: "HTTP over a Unix socket", HTTP: func(t *testing.T, srv *rpcjson.Server) (*http.Client, string) {
		dir, err := os.MkdirTemp("", "ota") // paths of sockets must be short
		require.NoError(t, err)
		path := filepath.Join(dir, "s")
		l, err := net.Listen("unix", path)
		require.NoError(t, err)
		web := &httptest.Server{Listener: l, Config: rpcjson.NewHTTPServer(srv)}
		web.Start()
		client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}}}
		t.Cleanup(func() {
			client.CloseIdleConnections()
			web.Close()
			os.RemoveAll(dir)
		})
		return client, "http://localhost/rpc"
	}})
	authmatrix.Run(t, authmatrix.Transport{Name: "frames", Frames: framesOf(rpcjson.Peer{Channel: "UART"})})
	authmatrix.Run(t, authmatrix.Transport{Name: "frames over time", Frames: framesOf(rpcjson.Peer{Channel: "MQTT", Addr: "x"}), Virtual: true})
	authmatrix.Run(t, authmatrix.Transport{Name: "frames of an open channel", Frames: func(t *testing.T, srv *rpcjson.Server) func([]byte) ([]byte, error) {
		peer := rpcjson.Peer{Channel: "TCP", Addr: "127.0.0.1:5"}
		require.NoError(t, srv.Admit(t.Context(), &peer))
		return framesOf(peer)(t, srv)
	}})
}

func framesOf(peer rpcjson.Peer) func(*testing.T, *rpcjson.Server) func([]byte) ([]byte, error) {
	return func(t *testing.T, srv *rpcjson.Server) func([]byte) ([]byte, error) {
		return func(frame []byte) (reply []byte, err error) {
			err = srv.Serve(t.Context(), peer, frame, func(b []byte) error { reply = b; return nil })
			return reply, err
		}
	}
}
