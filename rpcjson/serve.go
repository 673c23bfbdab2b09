package rpcjson

import (
	"net"
	"net/http"
	"sync"
	"time"
)

// Limits of [NewHTTPServer].
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = time.Minute
	maxHeader     = 16 << 10
)

// NewHTTPServer returns a server for h with limits that a device needs: the header
// of a request must come within 10 s and 16 KiB, and idle connections are closed
// after a minute. There is none for a whole request, as an update may take long;
// [Server] bounds the time for reading a body and sending an answer by itself. Use
// it with a listener by [LimitListener].
func NewHTTPServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
	}
}

// LimitListener returns a listener that closes connections at once which exceed n
// at a time, or half of that from one IP address (see [Limits]).
func LimitListener(l net.Listener, n int) net.Listener {
	return &limitListener{Listener: l, max: n, open: map[string]int{}}
}

type limitListener struct {
	net.Listener
	max int

	mu   sync.Mutex
	n    int
	open map[string]int // by peer
}

// Accept implements net.Listener.
func (l *limitListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		key := addrKey(c.RemoteAddr().String())
		if l.acquire(key) {
			return &limitConn{Conn: c, release: sync.OnceFunc(func() { l.release(key) })}, nil
		}
		_ = c.Close()
	}
}

func (l *limitListener) acquire(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, tcp := l.Listener.Addr().(*net.TCPAddr)
	if l.n >= l.max || tcp && l.open[key] >= max(1, l.max/2) {
		return false
	}
	l.n++
	l.open[key]++
	return true
}

func (l *limitListener) release(key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.n--
	if l.open[key]--; l.open[key] == 0 {
		delete(l.open, key)
	}
}

type limitConn struct {
	net.Conn
	release func()
}

// Close implements net.Conn.
func (c *limitConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
