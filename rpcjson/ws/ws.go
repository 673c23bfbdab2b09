// Package ws carries the calls of package rpcjson over WebSocket (RFC 6455), with
// the library github.com/coder/websocket.
//
// A device that can be reached serves them on the path of its HTTP handler:
//
//	h := ws.NewHandler(srv, nil) // srv is a *rpcjson.Server
//	defer h.Close()
//	http.Handle("/rpc", h)
//	http.Handle("/rpc/", h)
//
// One that cannot be, for its network hides it, calls a server and serves what
// comes from there:
//
//	err := ws.Connect(ctx, srv, "wss://fleet.example/devices/42", nil)
//
// A client dials:
//
//	ch, err := ws.Dial(ctx, "ws://192.168.1.2/rpc", nil)
//	c := rpcjson.NewClient(ch, nil)
//
// Each message is one frame. Sent are text messages; binary ones are understood,
// too. Any subprotocol is agreed to. (mongoose-os-libs/rpc-ws;
// mongoose-os/mos, common/mgrpc/codec/websocket.go.)
//
// The genuine client, mos, sends the header Origin: https://api.cesanta.com/, as
// only pages of that origin should. To be called by mos, a device must list it in
// AllowOrigins of [rpcjson.Options].
package ws

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"github.com/slotota/ota/internal/link"
	"github.com/slotota/ota/rpcjson"
)

// Defaults of Options.
const (
	DefaultMaxConns     = 256
	DefaultMaxPending   = 8
	DefaultPingInterval = 30 * time.Second
	DefaultIdleTimeout  = 10 * time.Minute
)

// Time limits of one message.
const (
	readTimeout  = 20 * time.Second // for its first bytes, and for the rest once that may come
	writeTimeout = 30 * time.Second
	closeTimeout = time.Second // for the peer's answer to a closing handshake
)

// maxReading bounds the messages of shortMessage bytes and more that are being
// received at a time, by all connections of a Handler. Shorter ones, as nearly all
// calls but OTA.Write are, do not wait for a place.
const (
	maxReading   = 32
	shortMessage = 2 << 10
)

// Options configure how connections are served. The zero value is safe.
type Options struct {
	// MaxConns bounds the connections that a Handler has at a time; more are
	// answered 503. 0 means DefaultMaxConns. Of messages of 2 KiB and more, as
	// chunks of firmware are, 32 are received at a time, each for 20 seconds at
	// most; others wait in turn, so that peers which are slow on purpose can delay
	// one for 20 seconds by every 32 of them.
	MaxConns int
	// MaxPending bounds the calls of one connection that are being served at a
	// time; more are answered with code 429. 0 means DefaultMaxPending.
	MaxPending int
	// PingInterval is how often the peer is asked whether it is still there.
	// If it has not answered after the same time again it has gone. 0 means
	// DefaultPingInterval.
	PingInterval time.Duration
	// IdleTimeout is how long a Handler keeps a connection over which no calls
	// come, rounded up to a multiple of PingInterval. 0 means
	// DefaultIdleTimeout; a negative value, for ever.
	IdleTimeout time.Duration
	// Logger gets a line for each connection; nil means silence.
	Logger *slog.Logger
}

func (o *Options) complete() Options {
	var c Options
	if o != nil {
		c = *o
	}
	if c.MaxConns <= 0 {
		c.MaxConns = DefaultMaxConns
	}
	if c.MaxPending <= 0 {
		c.MaxPending = DefaultMaxPending
	}
	if c.PingInterval <= 0 {
		c.PingInterval = DefaultPingInterval
	}
	if c.IdleTimeout == 0 {
		c.IdleTimeout = DefaultIdleTimeout
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Handler is an http.Handler that serves calls over WebSocket, if a request asks
// for that, and else over HTTP, as the [rpcjson.Server] does. Its methods may be
// called at any time from any goroutine.
type Handler struct {
	srv     *rpcjson.Server
	o       Options
	reading chan struct{} // an element for each message being received
	bufs    link.Buffers  // of messages

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	mu     sync.Mutex // guards what follows
	closed bool
	conns  int
	wg     sync.WaitGroup // of conns
}

// NewHandler returns a handler for the calls that srv serves. o may be nil.
func NewHandler(srv *rpcjson.Server, o *Options) *Handler {
	h := &Handler{srv: srv, o: o.complete(), reading: make(chan struct{}, maxReading)}
	h.ctx, h.cancel = context.WithCancel(context.Background())
	return h
}

// ServeHTTP serves a connection until it ends, if r asks for WebSocket on one of
// the paths /rpc, /rpc/ and /, and else serves r as [rpcjson.Server.ServeHTTP]. An
// upgrade that a foreign web page could have caused is refused, as no browser
// applies its same-origin policy to them (RFC 6455, section 10.2), and so are wrong
// credentials, see [rpcjson.Server.Admit]. A frame that cannot be understood ends
// the connection, as in the original.
//
// Who calls is known to the [rpcjson.Authorizer] by the request, such as by its
// header Authorization, or by the member auth of each frame.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !wantsUpgrade(r) {
		h.srv.ServeHTTP(w, r)
		return
	}
	peer := rpcjson.Peer{Channel: "WS_in", Addr: r.RemoteAddr, Request: r}
	if err := h.srv.Admit(r.Context(), &peer); err != nil {
		h.srv.Refuse(w, err)
		return
	}
	if !h.enter() {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, `{"code":503,"message":"too many connections"}`+"\r\n")
		return
	}
	defer h.leave()
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{
		Subprotocols:       subprotocols(r),
		InsecureSkipVerify: true, // Admit has looked at more than the library would
	})
	if err != nil {
		h.o.Logger.Debug("websocket refused", "peer", r.RemoteAddr, "err", err)
		return
	}
	h.o.Logger.Info("websocket opened", "peer", r.RemoteAddr)
	s := &session{
		c: c, srv: h.srv, o: h.o, reading: h.reading, bufs: &h.bufs, inbound: true, peer: peer,
	}
	err = s.serve(r.Context(), h.ctx)
	h.o.Logger.Info("websocket closed", "peer", r.RemoteAddr, "err", err)
}

func (h *Handler) enter() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed || h.conns >= h.o.MaxConns {
		return false
	}
	h.conns++
	h.wg.Add(1)
	return true
}

func (h *Handler) leave() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.conns--
	h.wg.Done()
}

// Close ends all connections, which [http.Server.Shutdown] does not, and the
// contexts of their calls, and waits until they have ended. Further ones are
// refused. It returns nil, also when called again. A handler of a call must not
// call it.
func (h *Handler) Close() error {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.cancel()
	h.wg.Wait()
	return nil
}

// wantsUpgrade reports whether r asks for WebSocket where frames are served.
func wantsUpgrade(r *http.Request) bool {
	switch r.URL.Path {
	case "/rpc", "/rpc/", "/":
		return r.Method == http.MethodGet && hasToken(r.Header, "Connection", "upgrade") && hasToken(r.Header, "Upgrade", "websocket")
	}
	return false
}

func hasToken(h http.Header, key, token string) bool {
	return slices.ContainsFunc(tokens(h, key), func(t string) bool { return strings.EqualFold(t, token) })
}

func tokens(h http.Header, key string) (all []string) {
	for _, v := range h.Values(key) {
		for t := range strings.SplitSeq(v, ",") {
			all = append(all, strings.TrimSpace(t))
		}
	}
	return all
}

// subprotocols returns what to agree to: whatever r asks for first. Browsers want
// one of those that they asked for.
func subprotocols(r *http.Request) []string {
	all := tokens(r.Header, "Sec-WebSocket-Protocol")
	if len(all) == 0 || all[0] == "" {
		return nil
	}
	return all[:1]
}

// session serves the calls that come over one connection.
type session struct {
	c       *websocket.Conn
	srv     *rpcjson.Server
	o       Options
	peer    rpcjson.Peer
	inbound bool // belongs to one peer: ends with a broken frame, or when idle
	reading chan struct{}
	bufs    *link.Buffers
	start   []byte       // room for the first bytes of a message
	size    int          // of the last long message
	busy    atomic.Int32 // messages on their way, in both directions

	mu      sync.Mutex
	pending int       // calls being served
	last    time.Time // when there was one
	why     error     // the connection was closed from here
}

// serve serves until the connection ends, and ends it when stop does.
func (s *session) serve(ctx, stop context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer s.c.CloseNow()
	defer cancel()
	s.c.SetReadLimit(int64(s.srv.MaxFrame()))
	s.last = time.Now()
	wg.Go(func() { s.mind(ctx, cancel, stop) })
	for {
		msg, err := s.read(ctx)
		if err != nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.why != nil {
				return s.why
			}
			return err
		}
		if !s.begin() {
			if reply := s.srv.RefuseFrame(msg, rpcjson.Overflow()); reply != nil {
				if err := s.write(ctx, reply); err != nil {
					return err
				}
			}
			s.bufs.Put(msg)
			continue
		}
		wg.Go(func() {
			defer s.end()
			s.call(ctx, cancel, msg)
			s.bufs.Put(msg)
		})
	}
}

// begin counts a call, if there may be one more.
func (s *session) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pending >= s.o.MaxPending {
		return false
	}
	s.pending++
	return true
}

func (s *session) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pending--
	s.last = time.Now()
}

// idle reports whether there were no calls for too long.
func (s *session) idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.inbound && s.o.IdleTimeout > 0 && s.pending == 0 && time.Since(s.last) >= s.o.IdleTimeout
}

// Why a connection was closed.
var (
	errStopped = errors.New("shutting down")
	errIdle    = errors.New("idle")
	errGone    = errors.New("no answer to ping")
	errSlow    = errors.New("the message takes too long")
)

// close closes the connection with a handshake that says why.
func (s *session) close(cancel context.CancelFunc, code websocket.StatusCode, text string, why error) {
	s.mu.Lock()
	if s.why == nil {
		s.why = why
	}
	s.mu.Unlock()
	closeConn(s.c, cancel, code, text)
}

// mind watches over the connection.
func (s *session) mind(ctx context.Context, cancel context.CancelFunc, stop context.Context) {
	both, end := context.WithCancel(ctx)
	defer end()
	defer context.AfterFunc(stop, end)()
	tick := time.NewTicker(s.o.PingInterval)
	defer tick.Stop()
	for {
		select {
		case <-both.Done():
			if ctx.Err() == nil {
				s.close(cancel, websocket.StatusGoingAway, "shutting down", errStopped)
			}
			return
		case <-tick.C:
		}
		if s.idle() {
			s.close(cancel, websocket.StatusNormalClosure, "idle", errIdle)
			return
		}
		if s.busy.Load() > 0 {
			continue
		}
		if err := ping(both, s.c, s.o.PingInterval); err != nil && both.Err() == nil {
			s.close(cancel, websocket.StatusPolicyViolation, "no answer to ping", errGone)
			return
		}
	}
}

// ping asks whether the peer is there. There must be no long message on its way,
// which keeps ping and pong waiting: after 5 s the library gives up on them, and
// on the connection. Messages have time limits of their own.
func ping(ctx context.Context, c *websocket.Conn, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return c.Ping(ctx)
}

// closeConn does the closing handshake. cancel ends the context that the
// connection is read with.
func closeConn(c *websocket.Conn, cancel context.CancelFunc, code websocket.StatusCode, reason string) {
	t := time.AfterFunc(closeTimeout, cancel)
	defer t.Stop()
	defer cancel()
	_ = c.Close(code, reason)
}

// read returns the next message, in a buffer of its own: several calls may be under
// way.
func (s *session) read(ctx context.Context) ([]byte, error) {
	_, r, err := s.c.Reader(ctx)
	if err != nil {
		return nil, err
	}
	s.busy.Add(1)
	defer s.busy.Add(-1)
	if s.start == nil {
		s.start = make([]byte, 0, shortMessage)
	}
	var start []byte
	var whole bool
	err = s.within(func() error {
		start, whole, err = fill(r, s.start)
		return err
	})
	switch {
	case err != nil:
		return nil, err
	case whole:
		return bytes.Clone(start), nil
	}
	select {
	case s.reading <- struct{}{}:
		defer func() { <-s.reading }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	b := append(s.bufs.Get(max(s.size, 2*shortMessage)+512), start...)
	err = s.within(func() error {
		b, err = readAll(r, b)
		return err
	})
	s.size = len(b)
	return b, err
}

// within runs f, which reads from the connection, and closes that if it takes too
// long.
func (s *session) within(f func() error) error {
	slow := make(chan struct{})
	t := time.AfterFunc(readTimeout, func() {
		defer close(slow)
		_ = s.c.CloseNow()
	})
	err := f()
	if !t.Stop() {
		<-slow
		return errSlow
	}
	return err
}

// readAll is io.ReadAll, appending to b, which probably has room for all.
func readAll(r io.Reader, b []byte) ([]byte, error) {
	for {
		got, whole, err := fill(r, b)
		switch {
		case err != nil:
			return nil, err
		case whole:
			return got, nil
		}
		b = slices.Grow(got, len(got))
	}
}

// fill reads into the room that b has. whole says that the message ends there.
func fill(r io.Reader, b []byte) (got []byte, whole bool, err error) {
	for len(b) < cap(b) {
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if err == io.EOF {
			return b, true, nil
		}
		if err != nil {
			return b, false, err
		}
	}
	return b, false, nil
}

func (s *session) write(ctx context.Context, reply []byte) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	s.busy.Add(1)
	defer s.busy.Add(-1)
	return s.c.Write(ctx, websocket.MessageText, reply)
}

// call serves one frame.
func (s *session) call(ctx context.Context, cancel context.CancelFunc, msg []byte) {
	err := s.srv.Serve(ctx, s.peer, msg, func(reply []byte) error { return s.write(ctx, reply) })
	switch {
	case err == nil:
	case errors.Is(err, rpcjson.ErrClosed):
		s.close(cancel, websocket.StatusGoingAway, "shutting down", err)
	case errors.Is(err, rpcjson.ErrInvalidFrame):
		if s.inbound {
			s.close(cancel, websocket.StatusInvalidFramePayloadData, "invalid frame", err)
			return
		}
		s.o.Logger.Debug("websocket: ignored", "peer", s.peer.Addr, "err", err)
	default:
		s.o.Logger.Debug("websocket: not answered", "peer", s.peer.Addr, "err", err)
	}
}
