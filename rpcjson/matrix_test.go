package rpcjson_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/internal/authmatrix"
	"github.com/slotota/ota/rpcjson"
)

// Who may call what, over all that this package has itself.
func TestMatrix(t *testing.T) {
	for _, tr := range []authmatrix.Transport{
		{Name: "HTTP", Channel: "HTTP", HTTP: func(t *testing.T, srv *rpcjson.Server, _ *authmatrix.PKI) (func(*tls.Certificate) *http.Client, string) {
			web := httptest.NewServer(srv)
			t.Cleanup(web.Close)
			return func(*tls.Certificate) *http.Client { return web.Client() }, web.URL + "/rpc"
		}},
		{Name: "HTTPS", Channel: "HTTP", Certs: true, HTTP: serveTLS},
		{Name: "HTTP over a Unix socket", Channel: "HTTP", HTTP: func(t *testing.T, srv *rpcjson.Server, _ *authmatrix.PKI) (func(*tls.Certificate) *http.Client, string) {
			l := listenUnix(t)
			web := &httptest.Server{Listener: l, Config: rpcjson.NewHTTPServer(srv)}
			web.Start()
			client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", l.Addr().String())
			}}}
			t.Cleanup(func() {
				client.CloseIdleConnections()
				web.Close()
			})
			return func(*tls.Certificate) *http.Client { return client }, "http://localhost/rpc"
		}},
		{Name: "TCP", Channel: "TCP", Frames: overListener("", listenTCP)},
		{Name: "TCP of users", Channel: "TCP", Users: true, Frames: overListener("TCP", listenTCP)},
		{Name: "Unix socket", Channel: "UNIX", Frames: overListener("", listenUnix)},
		{Name: "Unix socket of users", Channel: "UNIX", Users: true, Frames: overListener("UNIX", listenUnix)},
		{Name: "UDP", Channel: "UDP_in", Frames: overUDP(false)},
		{Name: "UDP of users", Channel: "UDP_in", Users: true, Frames: overUDP(true)},
		{Name: "standard input and output", Channel: "UART", Users: true, Frames: overStream(nil, func(t *testing.T) (mine, theirs io.ReadWriteCloser) {
			a, b, err := os.Pipe()
			require.NoError(t, err)
			c, d, err := os.Pipe()
			require.NoError(t, err)
			return twoFiles{a, d}, twoFiles{c, b}
		})},
		{Name: "serial framing over time", Channel: "UART", Users: true, Virtual: true, Frames: overStream(rpcjson.SerialStream(), func(*testing.T) (mine, theirs io.ReadWriteCloser) {
			return net.Pipe()
		})},
		{Name: "GATT over time", Channel: "GATTS", Users: true, Virtual: true, Frames: overGATT},
		{Name: "frames over time", Channel: "loopback", Users: true, Virtual: true, Frames: func(t *testing.T, srv *rpcjson.Server, _ *authmatrix.PKI) func(authmatrix.Opening) (authmatrix.RoundTrip, error) {
			return func(o authmatrix.Opening) (authmatrix.RoundTrip, error) {
				return func(frame []byte) ([]byte, error) {
					return srv.Call(t.Context(), rpcjson.Peer{Channel: "loopback", User: o.User}, frame)
				}, nil
			}
		}},
	} {
		authmatrix.Run(t, tr)
	}
}

func serveTLS(t *testing.T, srv *rpcjson.Server, pki *authmatrix.PKI) (func(*tls.Certificate) *http.Client, string) {
	web := httptest.NewUnstartedServer(srv)
	web.TLS = &tls.Config{ClientCAs: pki.Pool, ClientAuth: tls.VerifyClientCertIfGiven}
	web.Config.ErrorLog = log.New(io.Discard, "", 0) // handshakes that fail
	web.StartTLS()
	t.Cleanup(web.Close)
	return func(cert *tls.Certificate) *http.Client {
		tr := web.Client().Transport.(*http.Transport).Clone()
		if cert != nil {
			tr.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
		}
		t.Cleanup(tr.CloseIdleConnections)
		return &http.Client{Transport: tr}
	}, web.URL + "/rpc"
}

func listenTCP(t *testing.T) net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	return l
}

func listenUnix(t *testing.T) net.Listener {
	dir, err := os.MkdirTemp("", "ota") // paths of sockets must be short
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := rpcjson.ListenUnix(t.Context(), filepath.Join(dir, "s"))
	require.NoError(t, err)
	return l
}

// users knows who has which address.
type users struct {
	mu sync.Mutex
	of map[string]string
}

// dial opens a connection of user. Nobody asks for its user before that is known.
func (u *users) dial(t *testing.T, network, addr, user string) (net.Conn, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	d := net.Dialer{}
	if network == "unix" && user != "" { // an address of its own; to others the system gives none
		d.LocalAddr = &net.UnixAddr{Net: network, Name: filepath.Join(filepath.Dir(addr), fmt.Sprint(len(u.of)))}
	}
	c, err := d.DialContext(t.Context(), network, addr)
	if err == nil {
		u.of[c.LocalAddr().String()] = user
		t.Cleanup(func() { c.Close() })
	}
	return c, err
}

func (u *users) peer(channel string, addr net.Addr) (rpcjson.Peer, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return rpcjson.Peer{Channel: channel, Addr: addr.String(), User: u.of[addr.String()]}, nil
}

// roundTrips makes a RoundTrip of a channel.
func roundTrips(t *testing.T, ch rpcjson.Channel) authmatrix.RoundTrip {
	t.Cleanup(func() { ch.Close() })
	return func(frame []byte) ([]byte, error) { return ch.RoundTrip(t.Context(), frame, 4096) }
}

// background runs f until the test ends.
func background(t *testing.T, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
}

type frames = func(*testing.T, *rpcjson.Server, *authmatrix.PKI) func(authmatrix.Opening) (authmatrix.RoundTrip, error)

// overListener serves a listener; unless channel is "", with users.
func overListener(channel string, listen func(*testing.T) net.Listener) frames {
	return func(t *testing.T, srv *rpcjson.Server, _ *authmatrix.PKI) func(authmatrix.Opening) (authmatrix.RoundTrip, error) {
		u := &users{of: map[string]string{}}
		l := listen(t)
		background(t, func(ctx context.Context) error {
			if channel == "" {
				return srv.ServeListener(ctx, l, nil)
			}
			return srv.ServeListener(ctx, l, &rpcjson.ListenOptions{Peer: func(c net.Conn) (rpcjson.Peer, error) { return u.peer(channel, c.RemoteAddr()) }})
		})
		return func(o authmatrix.Opening) (authmatrix.RoundTrip, error) {
			c, err := u.dial(t, l.Addr().Network(), l.Addr().String(), o.User)
			if err != nil {
				return nil, err
			}
			return roundTrips(t, rpcjson.NewStreamOf(c, nil)), nil
		}
	}
}

func overUDP(withUsers bool) frames {
	return func(t *testing.T, srv *rpcjson.Server, _ *authmatrix.PKI) func(authmatrix.Opening) (authmatrix.RoundTrip, error) {
		u := &users{of: map[string]string{}}
		pc, err := net.ListenPacket("udp", "127.0.0.1:0")
		require.NoError(t, err)
		o := &rpcjson.PacketOptions{}
		if withUsers {
			o.Peer = func(a net.Addr) (rpcjson.Peer, error) { return u.peer("UDP_in", a) }
		}
		background(t, func(ctx context.Context) error { return srv.ServePacket(ctx, pc, o) })
		return func(o authmatrix.Opening) (authmatrix.RoundTrip, error) {
			return roundTrips(t, rpcjson.NewDatagram(func(context.Context) (net.Conn, error) {
				return u.dial(t, "udp", pc.LocalAddr().String(), o.User)
			}, &rpcjson.DatagramOptions{RetransmitAll: true})), nil // this server knows a repetition
		}
	}
}

// overStream serves streams that connect makes.
func overStream(o *rpcjson.StreamOptions, connect func(*testing.T) (mine, theirs io.ReadWriteCloser)) frames {
	return func(t *testing.T, srv *rpcjson.Server, _ *authmatrix.PKI) func(authmatrix.Opening) (authmatrix.RoundTrip, error) {
		return func(as authmatrix.Opening) (authmatrix.RoundTrip, error) {
			mine, theirs := connect(t)
			background(t, func(ctx context.Context) error {
				return srv.ServeStream(ctx, theirs, rpcjson.Peer{User: as.User}, o)
			})
			return roundTrips(t, rpcjson.NewStreamOf(mine, o)), nil
		}
	}
}

// twoFiles are a stream that is read from one and written to the other.
type twoFiles struct{ in, out *os.File }

func (f twoFiles) Read(b []byte) (int, error)  { return f.in.Read(b) }
func (f twoFiles) Write(b []byte) (int, error) { return f.out.Write(b) }
func (f twoFiles) Close() error                { f.in.Close(); return f.out.Close() }

// central is connected to a peripheral without any radio.
type central struct{ g *rpcjson.GATTServer }

func (c central) WriteCharacteristic(_ context.Context, uuid string, value []byte) error {
	return c.g.Write(uuid, value)
}
func (c central) ReadCharacteristic(_ context.Context, uuid string) ([]byte, error) {
	return c.g.Read(uuid, 20)
}
func (c central) Close() error { return c.g.Close() }

func overGATT(t *testing.T, srv *rpcjson.Server, _ *authmatrix.PKI) func(authmatrix.Opening) (authmatrix.RoundTrip, error) {
	return func(o authmatrix.Opening) (authmatrix.RoundTrip, error) {
		var ch *rpcjson.GATT
		g := srv.NewGATTServer(t.Context(), rpcjson.Peer{Addr: "aa:bb", User: o.User}, func([]byte) { ch.Notified() })
		ch = rpcjson.NewGATT(central{g}, 0)
		return roundTrips(t, ch), nil
	}
}
