package ws

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/link"
	"github.com/slotota/ota/rpcjson"
)

// handshakeTimeout bounds an attempt to connect.
const handshakeTimeout = 20 * time.Second

// DialOptions say how to connect. The zero value is safe.
type DialOptions struct {
	// Token is sent as bearer token in the handshake (RFC 6750). Over ws, in
	// contrast to wss, whoever listens can read it.
	Token string
	// Header has more to send in the handshake, such as other credentials.
	Header http.Header
	// Subprotocol is what to ask for. "" means none for Dial, and json-rpc for
	// Connect, as the original does.
	Subprotocol string
	// TLS is used for wss URLs; nil trusts the certificates of the system.
	TLS *tls.Config
	// DialContext opens the connection; nil means a [net.Dialer] with a time
	// limit. Proxies from the environment are not used.
	DialContext func(ctx context.Context, network, addr string) (net.Conn, error)
}

// dialer connects to one URL.
type dialer struct {
	url       string
	host      string
	options   websocket.DialOptions
	transport *http.Transport
}

func newDialer(rawURL string, o *DialOptions, subprotocol string) (*dialer, error) {
	if o == nil {
		o = &DialOptions{}
	}
	u, err := url.Parse(rawURL)
	switch {
	case err != nil:
		return nil, fmt.Errorf("ws: not a URL: %w", ota.ErrInvalid) // the error of Parse quotes all of it
	case u.Scheme != "ws" && u.Scheme != "wss":
		return nil, fmt.Errorf("ws: URL scheme %s: need ws or wss: %w", ota.Quote(u.Scheme), ota.ErrInvalid)
	case u.Host == "":
		return nil, fmt.Errorf("ws: URL without a host: %w", ota.ErrInvalid)
	case u.User != nil:
		return nil, fmt.Errorf("ws: credentials in the URL; they have an option of their own: %w", ota.ErrInvalid)
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/rpc"
	}
	u.Fragment = ""
	d := &dialer{url: u.String(), host: u.Host}
	d.transport = &http.Transport{
		DialContext:         o.DialContext,
		TLSClientConfig:     o.TLS,
		TLSHandshakeTimeout: 15 * time.Second,
	}
	if o.DialContext == nil {
		d.transport.DialContext = (&net.Dialer{Timeout: 10 * time.Second}).DialContext
	}
	d.options.HTTPClient = &http.Client{
		Transport: d.transport,
		// A redirect would take the token, and the firmware, somewhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	d.options.HTTPHeader = o.Header.Clone()
	if d.options.HTTPHeader == nil {
		d.options.HTTPHeader = http.Header{}
	}
	if d.options.HTTPHeader.Get("User-Agent") == "" {
		d.options.HTTPHeader.Set("User-Agent", "ota")
	}
	if o.Token != "" {
		d.options.HTTPHeader.Set("Authorization", "Bearer "+o.Token)
	}
	if o.Subprotocol != "" {
		subprotocol = o.Subprotocol
	}
	if subprotocol != "" {
		d.options.Subprotocols = []string{subprotocol}
	}
	return d, nil
}

// dial connects. An error of type *rpcjson.Error is what the server answered.
func (d *dialer) dial(ctx context.Context) (*websocket.Conn, *coalescer, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	var raw *coalescer
	transport := d.transport.Clone()
	transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := d.transport.DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		raw = newCoalescer(c)
		return raw, nil
	}
	defer transport.CloseIdleConnections()
	client := *d.options.HTTPClient
	client.Transport = transport
	o := d.options
	o.HTTPClient = &client
	c, res, err := websocket.Dial(ctx, d.url, &o)
	if err == nil {
		return c, raw, nil
	}
	if res == nil || res.StatusCode == http.StatusSwitchingProtocols {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return nil, nil, err
	}
	e := &rpcjson.Error{Code: res.StatusCode, Message: "HTTP status " + res.Status}
	var body []byte
	if res.Body != nil {
		body, _ = io.ReadAll(io.LimitReader(res.Body, 1024))
	}
	var remote struct {
		Code    int
		Message string
	}
	switch text := strings.TrimSpace(string(body)); {
	case json.Unmarshal(body, &remote) == nil && remote.Code != 0:
		e.Code, e.Message = remote.Code, remote.Message
	case text != "":
		e.Message += ": " + ota.Quote(text)
	}
	return nil, nil, e
}

// Channel carries the calls of a [rpcjson.Client] over one connection, which it
// opens when there is something to send, also after the last one broke. Its
// methods may be called concurrently.
type Channel struct {
	d *dialer

	opening chan struct{} // of capacity one: held to open a connection
	mu      sync.Mutex    // guards what follows
	conn    *clientConn   // the last one; nil before the first
	closed  bool
}

// Dial returns a channel to the device at rawURL:
//
//	ws://HOST[:PORT][/PATH]    the path is /rpc unless given
//	wss://HOST[:PORT][/PATH]   likewise, over TLS
//
// Nothing is sent yet. Errors wrap [ota.ErrInvalid]. o may be nil.
func Dial(_ context.Context, rawURL string, o *DialOptions) (*Channel, error) {
	d, err := newDialer(rawURL, o, "")
	if err != nil {
		return nil, err
	}
	return &Channel{d: d, opening: make(chan struct{}, 1)}, nil
}

// clientConn is a connection that calls go over.
type clientConn struct {
	c      *websocket.Conn
	raw    *coalescer
	cancel context.CancelFunc
	calls  link.Calls
	busy   atomic.Int32 // calls being written
	wg     sync.WaitGroup
}

// A peer that has gone is noticed after the two together.
const (
	clientPing    = 10 * time.Second
	clientPingFor = 30 * time.Second
)

// run receives replies until the connection breaks.
func (cc *clientConn) run(ctx context.Context) {
	defer cc.c.CloseNow()
	defer cc.cancel()
	for size := 0; ; {
		_, r, err := cc.c.Reader(ctx)
		var b []byte
		if err == nil {
			b, err = readAll(r, make([]byte, 0, size+512))
		}
		if errors.Is(err, websocket.ErrMessageTooBig) {
			err = fmt.Errorf("reply is too long: %w", ota.ErrTooLarge)
		}
		if err != nil {
			cc.calls.Fail(fmt.Errorf("websocket: %w", err))
			return
		}
		size = len(b)
		if h, err := rpcjson.ParseHeader(b); err == nil && h.Method == "" {
			cc.calls.Deliver(h.ID, b)
		}
	}
}

// mind notices when the peer has gone.
func (cc *clientConn) mind(ctx context.Context) {
	tick := time.NewTicker(clientPing)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if cc.busy.Load() > 0 {
			continue
		}
		if err := ping(ctx, cc.c, clientPingFor); err != nil {
			cc.calls.Fail(fmt.Errorf("websocket: no answer to ping: %w", err))
			cc.cancel()
			return
		}
	}
}

var errClosed = errors.New("ws: channel closed")

// connection returns the open connection, or a new one.
func (ch *Channel) connection(ctx context.Context) (*clientConn, error) {
	if cc, err := ch.current(); cc != nil || err != nil {
		return cc, err
	}
	select {
	case ch.opening <- struct{}{}:
		defer func() { <-ch.opening }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if cc, err := ch.current(); cc != nil || err != nil {
		return cc, err // another call has opened it
	}
	c, raw, err := ch.d.dial(ctx)
	if err != nil {
		return nil, err
	}
	cc := &clientConn{c: c, raw: raw}
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if ch.closed {
		_ = c.CloseNow()
		return nil, errClosed
	}
	// The connection outlives the call.
	connCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	cc.cancel = cancel
	cc.wg.Go(func() { cc.run(connCtx) })
	cc.wg.Go(func() { cc.mind(connCtx) })
	ch.conn = cc
	return cc, nil
}

// current returns the connection if it is open.
func (ch *Channel) current() (*clientConn, error) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	switch {
	case ch.closed:
		return nil, errClosed
	case ch.conn == nil || ch.conn.calls.Err() != nil:
		return nil, nil
	}
	return ch.conn, nil
}

// Window returns how many calls a push may have under way, see [rpcjson.Channel].
func (ch *Channel) Window() int { return 3 }

// RoundTrip implements [rpcjson.Channel].
func (ch *Channel) RoundTrip(ctx context.Context, frame []byte, max int) ([]byte, error) {
	id, err := link.ID(frame)
	if err != nil {
		return nil, err
	}
	cc, err := ch.connection(ctx)
	if err != nil {
		return nil, err
	}
	cc.c.SetReadLimit(int64(max))
	reply, err := cc.calls.Add(id)
	if err != nil {
		return nil, err
	}
	defer cc.calls.Remove(id)
	if err := cc.raw.hold(ctx); err != nil {
		return nil, err
	}
	cc.busy.Add(1)
	err = cc.c.Write(ctx, websocket.MessageText, frame)
	if e := cc.raw.release(ctx); err == nil {
		err = e
	}
	cc.busy.Add(-1)
	if err != nil {
		cc.calls.Fail(fmt.Errorf("websocket: %w", err)) // part of it may be on its way
		cc.cancel()
		return nil, cc.calls.Err()
	}
	select {
	case b, ok := <-reply:
		if !ok {
			return nil, cc.calls.Err()
		}
		return b, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Close ends the connection, and the calls that wait for replies.
func (ch *Channel) Close() error {
	ch.mu.Lock()
	cc := ch.conn
	ch.closed = true
	ch.mu.Unlock()
	if cc != nil {
		cc.calls.Fail(errClosed)
		closeConn(cc.c, cc.cancel, websocket.StatusNormalClosure, "")
		cc.wg.Wait()
	}
	return nil
}
