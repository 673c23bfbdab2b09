package rpcjson

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/slotota/ota"
)

// Defaults of ListenOptions, and the time for connecting.
const (
	DefaultMaxConns    = 256
	DefaultIdleTimeout = 5 * time.Minute

	keepAlivePeriod  = time.Minute
	dialTimeout      = 10 * time.Second
	handshakeTimeout = 10 * time.Second // of TLS
)

// ListenOptions configure [Server.ServeListener]. The zero value is safe.
type ListenOptions struct {
	// Stream says how frames are carried. Its IdleTimeout is DefaultIdleTimeout
	// if it is 0 here, and never if it is negative.
	Stream StreamOptions
	// MaxConns bounds the connections; more are closed as they come. 0 means
	// DefaultMaxConns.
	MaxConns int
	// Peer, if not nil, describes the other side of a connection, or refuses it
	// with an error: by its address, or by the credentials that the system
	// tells of the process at the other end of a Unix socket.
	Peer func(net.Conn) (Peer, error)
}

// ServeListener accepts connections and serves the frames on them (see
// [Server.ServeStream]) until ctx ends or the server or l is closed, which it
// returns the cause of. If accepting fails otherwise, it tries again, as that can
// pass. It closes l and all connections, and waits for them.
//
// The connections are neither encrypted nor authenticated, unless l is that of
// [tls.NewListener], for example with [MutualTLS]: then the client certificate
// shows who calls. The [Authorizer] is asked about each call, with a [Peer] whose
// Channel is TCP or UNIX; else only what frames carry in their auth member proves
// who sends them. o may be nil.
func (s *Server) ServeListener(ctx context.Context, l net.Listener, o *ListenOptions) error {
	var opt ListenOptions
	if o != nil {
		opt = *o
	}
	if opt.MaxConns <= 0 {
		opt.MaxConns = DefaultMaxConns
	}
	if opt.Stream.IdleTimeout == 0 {
		opt.Stream.IdleTimeout = DefaultIdleTimeout
	}
	if opt.Peer == nil {
		opt.Peer = connPeer
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer context.AfterFunc(s.ctx, func() { cancel(ErrClosed) })()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer l.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)

	places := make(chan struct{}, opt.MaxConns)
	delay := time.Duration(0)
	for {
		conn, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				conn.Close()
			}
			return context.Cause(ctx)
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("rpcjson: accept: %w", err)
		case err != nil:
			// Mostly there are too many files open, or the peer has gone already.
			s.log.Warn("rpc: accept failed", "err", err)
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			if err := sleep(ctx, delay); err != nil {
				return err
			}
			continue
		}
		delay = 0
		select {
		case places <- struct{}{}:
		default:
			s.log.Warn("rpc: too many connections", "peer", conn.RemoteAddr().String())
			conn.Close()
			continue
		}
		wg.Go(func() {
			defer func() { <-places }()
			peer, err := opt.accepted(ctx, conn)
			if err != nil {
				conn.Close()
				s.log.Warn("rpc: connection refused", "peer", conn.RemoteAddr().String(), "err", err)
				return
			}
			if err := s.ServeStream(ctx, conn, peer, &opt.Stream); err != nil && ctx.Err() == nil {
				s.log.Debug("rpc: connection ended", "err", err)
			}
		})
	}
}

// accepted prepares a connection and describes its other side.
func (o *ListenOptions) accepted(ctx context.Context, conn net.Conn) (Peer, error) {
	raw := conn
	secure, _ := conn.(*tls.Conn)
	if secure != nil {
		raw = secure.NetConn()
	}
	if t, ok := raw.(*net.TCPConn); ok {
		_ = t.SetKeepAlive(true)
		_ = t.SetKeepAlivePeriod(keepAlivePeriod)
	}
	if secure == nil {
		return o.Peer(conn)
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	if err := secure.HandshakeContext(ctx); err != nil {
		return Peer{}, err
	}
	peer, err := o.Peer(conn)
	if peer.TLS == nil {
		state := secure.ConnectionState()
		peer.TLS = &state
	}
	return peer, err
}

// connPeer describes the other side of a connection.
func connPeer(c net.Conn) (Peer, error) {
	a := c.RemoteAddr()
	if a.Network() == "unix" {
		return Peer{Channel: "UNIX", Addr: a.String()}, nil
	}
	return Peer{Channel: "TCP", Addr: a.String()}, nil
}

// isRefused reports whether nobody listens where the dialing failed with err.
func isRefused(err error) bool {
	const winRefused = syscall.Errno(10061) // WSAECONNREFUSED
	return errors.Is(err, syscall.ECONNREFUSED) || runtime.GOOS == "windows" && errors.Is(err, winRefused)
}

// ListenUnix listens on a Unix socket that only its owner (and root) can connect
// to, and that goes away with the listener. What a dead server has left behind is
// replaced; the error wraps [ota.ErrBusy] if a server lives there. Where it cannot
// be told whether one does, nothing is removed.
func ListenUnix(ctx context.Context, path string) (net.Listener, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode()&fs.ModeSocket != 0 {
		d := net.Dialer{Timeout: dialTimeout}
		c, err := d.DialContext(ctx, "unix", path)
		if err == nil {
			c.Close()
			return nil, fmt.Errorf("rpcjson: listen: %s: a server listens there: %w", ota.Quote(path), ota.ErrBusy)
		}
		if isRefused(err) { // and not, for example, a live one that has its queue full
			err = os.Remove(path)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("rpcjson: listen: %w", err)
		}
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error { return ownerOnly(c) }}
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("rpcjson: %w", err)
	}
	// Where the system does not take the mode of the unbound socket for its file.
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("rpcjson: listen: %w", err)
	}
	return l, nil
}
