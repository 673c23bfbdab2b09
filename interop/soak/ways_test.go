package soak_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	mqttserver "github.com/mochi-mqtt/server/v2"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/interop/mochi"
	"github.com/slotota/ota/rpcjson"
	"github.com/slotota/ota/rpcjson/mqtt"
	"github.com/slotota/ota/rpcjson/serial"
	"github.com/slotota/ota/rpcjson/ws"
)

const deviceID = "sim"

// way is a way to a device, of which boots and clients come and go.
type way struct {
	// serve is what the device does after a boot, until ctx ends.
	serve func(ctx context.Context, srv *rpcjson.Server) error
	dial  func() (*rpcjson.Client, error)
	close func() // removes what outlives the device
}

// ways make one way over each transport that a device can be served on.
var ways = []struct {
	name string
	open func(*testing.T) way
}{
	{"http", overHTTP}, {"ws", overWS}, {"mqtt", overMQTT}, {"serial", overSerial},
	{"tcp", overTCP}, {"udp", overUDP}, {"unix", overUnix}, {"stdio", overStdio},
}

// opts are those of all clients. A call that is lost on the way to a device that is
// off is repeated after the timeout.
var opts = &rpcjson.ClientOptions{Timeout: 10 * time.Second}

// freeAddr returns an address at which the device is to be reached for all its life.
func freeAddr(t *testing.T, network string) string {
	t.Helper()
	if network == "udp" {
		c, err := net.ListenPacket(network, "127.0.0.1:0")
		require.NoError(t, err)
		defer c.Close()
		return c.LocalAddr().String()
	}
	l, err := net.Listen(network, "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

func noClose() {}

// web serves what handler returns for a server, which it stops in the end.
func web(addr string, handler func(*rpcjson.Server) (h http.Handler, stop func() error)) func(context.Context, *rpcjson.Server) error {
	return func(ctx context.Context, srv *rpcjson.Server) error {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		h, stop := handler(srv)
		web := rpcjson.NewHTTPServer(h)
		defer context.AfterFunc(ctx, func() { web.Close() })()
		if err := web.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return stop()
	}
}

func overHTTP(t *testing.T) way {
	addr := freeAddr(t, "tcp")
	return way{
		serve: web(addr, func(srv *rpcjson.Server) (http.Handler, func() error) {
			return srv, func() error { return nil }
		}),
		dial:  func() (*rpcjson.Client, error) { return rpcjson.Dial(t.Context(), "http://"+addr+"/rpc", opts) },
		close: noClose,
	}
}

func overWS(t *testing.T) way {
	addr := freeAddr(t, "tcp")
	return way{
		serve: web(addr, func(srv *rpcjson.Server) (http.Handler, func() error) {
			h := ws.NewHandler(srv, nil)
			return h, h.Close
		}),
		dial: func() (*rpcjson.Client, error) {
			ch, err := ws.Dial(t.Context(), "ws://"+addr+"/rpc", nil)
			return rpcjson.NewClient(ch, opts), err
		},
		close: noClose,
	}
}

func overMQTT(t *testing.T) way {
	broker, addr := mochi.Start(t, new(mqttserver.Options))
	url := "mqtt://" + addr
	return way{
		serve: func(ctx context.Context, srv *rpcjson.Server) error {
			return mqtt.Serve(ctx, srv, url, &mqtt.ServeOptions{MinDelay: time.Millisecond, MaxDelay: 50 * time.Millisecond})
		},
		dial: func() (*rpcjson.Client, error) {
			ch, err := mqtt.Dial(t.Context(), url+"/"+deviceID, nil)
			return rpcjson.NewClient(ch, opts), err
		},
		close: func() { broker.Close() },
	}
}

func overSerial(t *testing.T) way {
	line, port, closeLine := openPTY(t)
	return way{
		serve: func(ctx context.Context, srv *rpcjson.Server) error {
			return serial.Serve(ctx, srv, port, nil)
		},
		dial: func() (*rpcjson.Client, error) {
			return rpcjson.NewClient(rpcjson.NewStream(func(context.Context) (io.ReadWriteCloser, error) { return line() }, rpcjson.SerialStream()), opts), nil
		},
		close: closeLine,
	}
}

func overTCP(t *testing.T) way {
	addr := freeAddr(t, "tcp")
	return way{
		serve: func(ctx context.Context, srv *rpcjson.Server) error {
			l, err := net.Listen("tcp", addr)
			if err != nil {
				return err
			}
			return srv.ServeListener(ctx, l, nil)
		},
		dial:  func() (*rpcjson.Client, error) { return rpcjson.DialTCP(addr, opts, nil), nil },
		close: noClose,
	}
}

func overUDP(t *testing.T) way {
	addr := freeAddr(t, "udp")
	return way{
		serve: func(ctx context.Context, srv *rpcjson.Server) error {
			pc, err := net.ListenPacket("udp", addr)
			if err != nil {
				return err
			}
			return srv.ServePacket(ctx, pc, nil)
		},
		dial:  func() (*rpcjson.Client, error) { return rpcjson.DialUDP(addr, opts, nil), nil },
		close: noClose,
	}
}

func overUnix(t *testing.T) way {
	path := filepath.Join(t.TempDir(), "rpc")
	return way{
		serve: func(ctx context.Context, srv *rpcjson.Server) error {
			l, err := rpcjson.ListenUnix(ctx, path)
			if err != nil {
				return err
			}
			return srv.ServeListener(ctx, l, nil)
		},
		dial:  func() (*rpcjson.Client, error) { return rpcjson.DialUnix(path, opts, nil), nil },
		close: noClose,
	}
}

// pipes are two pipes as one stream: standard input and output of a process.
type pipes struct{ in, out *os.File }

func (p pipes) Read(b []byte) (int, error)  { return p.in.Read(b) }
func (p pipes) Write(b []byte) (int, error) { return p.out.Write(b) }
func (p pipes) Close() error                { return errors.Join(p.in.Close(), p.out.Close()) }

// overStdio serves what a client has started, as over ssh.
func overStdio(t *testing.T) way {
	started := make(chan pipes)
	return way{
		serve: func(ctx context.Context, srv *rpcjson.Server) error {
			for {
				select {
				case p := <-started:
					if err := srv.ServeStream(ctx, p, rpcjson.Peer{Channel: "stdio"}, nil); err != nil {
						return err
					}
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		},
		dial: func() (*rpcjson.Client, error) {
			return rpcjson.NewClient(rpcjson.NewStream(func(ctx context.Context) (io.ReadWriteCloser, error) {
				var client, device pipes
				var err error
				if device.in, client.out, err = os.Pipe(); err != nil {
					return nil, err
				}
				if client.in, device.out, err = os.Pipe(); err != nil {
					return nil, errors.Join(err, device.in.Close(), client.out.Close())
				}
				select {
				case started <- device:
					return client, nil
				case <-ctx.Done():
					return nil, errors.Join(ctx.Err(), client.Close(), device.Close())
				}
			}, nil), opts), nil
		},
		close: noClose,
	}
}
