package rpcjson

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/link"
)

// Defaults of ClientOptions; the timeout is that of mos.
const (
	DefaultCallTimeout = 20 * time.Second
	DefaultMaxReply    = 1 << 20
)

// ErrNoReply says that a call was sent, or could not be, and that no reply came:
// whether the device has acted on it is not known. [net.OpError] with the Op
// "dial" in the chain says that it has not.
var ErrNoReply = errors.New("no reply")

// ErrBadReply says that what came back is no reply to the call. Whether the
// device has acted on it is not known.
var ErrBadReply = errors.New("unintelligible reply")

// Channel carries frames to a device and their replies back. Its methods may be
// called concurrently. Two more are optional, for [Client.Push]: ChunkSize() int says
// how many bytes are best put into one OTA.Write, and Window() int how many of these
// calls may be under way at a time if the device is one of this package.
type Channel interface {
	// RoundTrip sends a request frame, which ends in a newline, and returns the
	// reply to it, of at most max bytes. An error of type *Error comes from the
	// device, or from what stands in front of it; any other one means that there
	// was no reply. A reply that is too long wraps ota.ErrTooLarge. The frame must
	// not be changed, nor kept after the return.
	RoundTrip(ctx context.Context, frame []byte, max int) (reply []byte, err error)
	Close() error
}

// Addresser is a [Channel] that knows who talks to whom; its addresses become the
// src and dst of each request, instead of "ota" and none. Over MQTT the src says
// where the reply goes.
type Addresser interface {
	Addresses() (src, dst string)
}

// ClientOptions configure a Client. The zero value is safe.
type ClientOptions struct {
	// Token is sent as HTTP bearer token (RFC 6750). Over plain http whoever
	// listens can read it.
	Token string
	// User and Password answer a device that asks for a digest, in the header
	// of HTTP or in frames. The password itself is never sent. They exclude
	// Token.
	User, Password string
	// HTTPClient is used for http and https URLs, but follows no redirects. nil
	// means one with a time limit for connecting, and without proxies from the
	// environment.
	HTTPClient *http.Client
	// Timeout bounds each call; 0 means DefaultCallTimeout.
	Timeout time.Duration
	// MaxReply bounds a reply, in bytes; 0 means DefaultMaxReply.
	MaxReply int
	// Dialers has the channels of further URL schemes, by scheme in lower case,
	// for [Dial]. They win over the built-in ones.
	Dialers map[string]Dialer
	// Stream and Datagram say how frames are carried over tcp and rpc+unix
	// URLs, and over udp; nil means the defaults.
	Stream   *StreamOptions
	Datagram *DatagramOptions
	// CompatArgs sends parameters as the member args, which is what the oldest
	// devices know, instead of params (mos --mgrpc-compat-args).
	CompatArgs bool
}

// Client calls the methods of a device: one that is served by this package, or a
// genuine one. Its methods may be called concurrently.
type Client struct {
	ch   Channel
	o    ClientOptions
	asks atomic.Bool // the device wants digests in frames
}

// Dialer makes the channel to a device, for [ClientOptions.Dialers]. It does not
// have to connect yet. Errors should not quote what may be a secret of the URL.
// The options are never nil.
type Dialer func(ctx context.Context, u *url.URL, o *ClientOptions) (Channel, error)

// Dial returns a client for the device at rawURL:
//
//	http://HOST[:PORT][/PATH]    frames are posted to PATH, or else to /rpc
//	https://HOST[:PORT][/PATH]   likewise
//	unix:///PATH                 HTTP over the socket at PATH
//	tcp://HOST:PORT              frames on a stream, see DialTCP
//	rpc+unix:///PATH             frames on a stream over the socket at PATH
//	udp://HOST:PORT              frames in datagrams, see DialUDP
//
// Others are those of [ClientOptions.Dialers]. Of these built-in ones nothing is
// sent yet, and credentials never to another host, as redirects are not followed.
// For other transports see [NewClient]. Errors wrap [ota.ErrInvalid]. o may be nil.
func Dial(ctx context.Context, rawURL string, o *ClientOptions) (*Client, error) {
	var opts ClientOptions
	if o != nil {
		opts = *o
	}
	ch, err := dial(ctx, rawURL, &opts)
	if err != nil {
		return nil, fmt.Errorf("rpcjson: device URL: %w: %w", err, ota.ErrInvalid)
	}
	return NewClient(ch, &opts), nil
}

func dial(ctx context.Context, rawURL string, o *ClientOptions) (Channel, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, errors.New("not a URL") // the error of Parse quotes all of it
	}
	if d := o.Dialers[u.Scheme]; d != nil {
		return d(ctx, u, o)
	}
	if u.User != nil {
		return nil, errors.New("credentials in the URL; they have an option of their own")
	}
	switch u.Scheme {
	case "tcp", "udp":
		if u.Hostname() == "" || u.Port() == "" || u.Path != "" && u.Path != "/" || u.RawQuery != "" {
			return nil, fmt.Errorf("need %s://HOST:PORT", u.Scheme)
		}
		if u.Scheme == "udp" {
			return dialDatagram(u.Host, o.Datagram), nil
		}
		return dialStream("tcp", u.Host, o.Stream), nil
	case "rpc+unix":
		if u.Path == "" || u.Host != "" || u.RawQuery != "" {
			return nil, errors.New("need rpc+unix:///PATH")
		}
		return dialStream("unix", u.Path, o.Stream), nil
	}
	return newHTTPChannel(u, o)
}

// NewClient returns a client that uses ch, which it closes with itself. o may be
// nil; its members about HTTP have no effect.
func NewClient(ch Channel, o *ClientOptions) *Client {
	c := &Client{ch: ch}
	if o != nil {
		c.o = *o
	}
	if c.o.Timeout <= 0 {
		c.o.Timeout = DefaultCallTimeout
	}
	if c.o.MaxReply <= 0 {
		c.o.MaxReply = DefaultMaxReply
	}
	return c
}

// Close gives up the connections to the device.
func (c *Client) Close() error { return c.ch.Close() }

// Call calls a method. params is encoded by encoding/json; nil sends none. The
// result is decoded into result, unless that is nil.
//
// An error that the device answers is an *[Error], which says by [errors.Is] what
// error of package ota it stands for, such as [ota.ErrBusy], [ota.ErrNotCommitted]
// or [ErrUnauthenticated]; but code 0 is a success (as old devices answer some
// calls). Others wrap [ErrNoReply], [ErrBadReply] or, if
// nothing was sent, [ota.ErrInvalid].
func (c *Client) Call(ctx context.Context, method string, params, result any) error {
	ctx, cancel := context.WithTimeout(ctx, c.o.Timeout)
	defer cancel()
	return c.call(ctx, method, params, result)
}

// call is Call without a time limit of its own.
func (c *Client) call(ctx context.Context, method string, params, result any) error {
	var enc func([]byte) ([]byte, error)
	if params != nil {
		enc = func(b []byte) ([]byte, error) { return appendJSON(b, params) }
	}
	req, err := c.request(nil, method, enc)
	if err != nil {
		return fmt.Errorf("rpcjson: %s: parameters: %w: %w", printable(method), err, ota.ErrInvalid)
	}
	return c.do(ctx, req, result)
}

// do sends a request and decodes the result.
func (c *Client) do(ctx context.Context, req *request, result any) error {
	method := req.method
	raw, err := c.authenticated(ctx, req)
	if err == nil && result != nil && len(raw) > 0 {
		if err = json.Unmarshal(raw, result); err != nil {
			err = fmt.Errorf("%w: result: %w", ErrBadReply, err)
		}
	}
	if e, ok := err.(*Error); ok {
		if e.Code == -1 && e.Message == "" && (method == "OTA.Commit" || method == "OTA.Revert") {
			e.Reason = reasonOf(ota.ErrCommitted) // that is how devices say it
		}
		return e
	}
	if err != nil {
		err = fmt.Errorf("rpcjson: %s: %w", printable(method), err)
	}
	return err
}

// bigFrame is the size from which on a challenge is asked for separately, in bytes,
// instead of sending the frame twice.
const bigFrame = 1 << 10

// authenticated sends a request, and again with a digest if the device asks for one.
func (c *Client) authenticated(ctx context.Context, req *request) (json.RawMessage, error) {
	var auth *frameAuth
	if c.asks.Load() && len(req.frame) > bigFrame {
		ping, err := c.request(nil, "RPC.Ping", nil)
		if err != nil {
			return nil, err
		}
		_, err = c.roundTrip(ctx, ping.end(nil), ping.id)
		auth = c.prove(err)
	}
	if auth == nil {
		raw, err := c.roundTrip(ctx, req.end(nil), req.id)
		if auth = c.prove(err); auth == nil {
			return raw, err
		}
		c.asks.Store(true)
	}
	return c.roundTrip(ctx, req.end(auth), req.id)
}

// roundTrip sends the frame of the call id and returns the result in its reply.
func (c *Client) roundTrip(ctx context.Context, frame []byte, id int64) (raw json.RawMessage, err error) {
	var b []byte
	if err = ctx.Err(); err == nil { // a channel may not look
		b, err = c.ch.RoundTrip(ctx, frame, c.o.MaxReply)
	}
	if err == nil {
		return parseReply(b, id)
	}
	if _, ok := err.(*Error); !ok && !errors.Is(err, ota.ErrTooLarge) {
		err = fmt.Errorf("%w: %w", ErrNoReply, err)
	}
	return nil, err
}

// frameAuth is the member auth of a frame, in the order of mos.
type frameAuth struct {
	Realm     string      `json:"realm"`
	User      string      `json:"username"`
	Nonce     json.Number `json:"nonce"`
	CNonce    json.Number `json:"cnonce"`
	Algorithm Algorithm   `json:"algorithm"`
	Response  string      `json:"response"`
	Opaque    string      `json:"opaque,omitempty"`
}

// prove answers the challenge in err, nil if there is none or nothing to answer it
// with.
func (c *Client) prove(err error) *frameAuth {
	e, ok := err.(*Error)
	if !ok || e.Code != 401 || c.o.User == "" || len(e.Message) > maxAuthHeader {
		return nil
	}
	var ch struct {
		Type      string      `json:"auth_type"`
		Nonce     json.Number `json:"nonce"`
		Realm     string      `json:"realm"`
		Algorithm string      `json:"algorithm"`
		Opaque    string      `json:"opaque"`
	}
	if json.Unmarshal([]byte(e.Message), &ch) != nil || ch.Type != "digest" || ch.Nonce == "" {
		return nil
	}
	a, known := parseAlgorithm(ch.Algorithm)
	if !known {
		return nil
	}
	d := digest{algorithm: a, user: c.o.User, realm: ch.Realm, nonce: ch.Nonce.String(), uri: frameURI, cnonce: randomNonce(), nc: "1"}
	return &frameAuth{
		Realm: ch.Realm, User: d.user, Nonce: ch.Nonce, CNonce: json.Number(d.cnonce), Algorithm: a, Opaque: ch.Opaque,
		Response: d.answer(a.hash(d.user, d.realm, c.o.Password), frameMethod),
	}
}

// request is a call to be sent.
type request struct {
	id     int64
	method string
	frame  []byte // with its members in the order of mos, up to where auth goes
}

// request makes a request in the memory of buf. params, if not nil, appends the
// parameters.
func (c *Client) request(buf []byte, method string, params func([]byte) ([]byte, error)) (*request, error) {
	src, dst := "ota", ""
	if a, ok := c.ch.(Addresser); ok {
		src, dst = a.Addresses()
	}
	// The largest id that every client and device takes for a number.
	r := &request{id: rand.Int64N(1<<40) + 1<<40, method: method}
	b := appendText(append(buf[:0], `{"src":`...), src)
	if dst != "" {
		b = appendText(append(b, `,"dst":`...), dst)
	}
	b = strconv.AppendInt(append(b, `,"id":`...), r.id, 10)
	b = appendText(append(b, `,"method":`...), method)
	var err error
	if params != nil {
		name := `,"params":`
		if c.o.CompatArgs {
			name = `,"args":`
		}
		b, err = params(append(b, name...))
	}
	r.frame = b
	return r, err
}

// end returns the whole frame. It may use the memory of r.frame.
func (r *request) end(auth *frameAuth) []byte {
	b := r.frame
	if auth != nil {
		b, _ = appendJSON(append(b, `,"auth":`...), auth) // has nothing that can fail
	}
	return append(b, "}\n"...)
}

// appendJSON appends the JSON text of v.
func appendJSON(b []byte, v any) ([]byte, error) {
	w := bytes.NewBuffer(b)
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false) // old devices do not resolve escapes in URLs
	if err := e.Encode(v); err != nil {
		return b, err
	}
	return bytes.TrimSuffix(w.Bytes(), []byte("\n")), nil
}

// appendText appends a JSON string, in which devices do not resolve escapes either.
func appendText(b []byte, s string) []byte {
	b, _ = appendJSON(b, s) // a string cannot fail
	return b
}

// parseReply returns the result in a reply to the call id.
func parseReply(b []byte, id int64) (json.RawMessage, error) {
	var reply struct {
		ID     json.RawMessage `json:"id"`
		Result json.RawMessage `json:"result"`
		Error  *Error          `json:"error"`
	}
	if err := json.Unmarshal(b, &reply); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadReply, err)
	}
	if got := strings.Trim(string(reply.ID), `"`); got != fmt.Sprint(id) {
		return nil, fmt.Errorf("%w: it is for call %s", ErrBadReply, ota.Quote(got))
	}
	if e := reply.Error; e != nil && e.Code != 0 {
		return nil, e
	}
	return reply.Result, nil
}

// httpChannel posts frames to a URL.
type httpChannel struct {
	url    string
	token  string
	login  *headerLogin // nil without user
	client *http.Client
	spare  link.Buffers // for requests
}

// headerLogin answers the challenges of one device.
type headerLogin struct {
	user, password string

	mu sync.Mutex
	d  digest // of the last challenge; without nonce there was none
	n  uint32 // how often it was answered
}

// header returns the header Authorization for a request, "" if no challenge is
// known.
func (l *headerLogin) header(method, uri string) string {
	l.mu.Lock()
	d := l.d
	l.n++
	n := l.n
	l.mu.Unlock()
	if d.nonce == "" {
		return ""
	}
	d.user, d.uri, d.nc, d.cnonce = l.user, uri, fmt.Sprintf("%08x", n), randomNonce()
	d.response = d.answer(d.algorithm.hash(l.user, d.realm, l.password), method)
	return d.header()
}

// challenged takes over the best challenge of an answer 401. It returns false if
// there is none that it understands.
func (l *headerLogin) challenged(h http.Header) bool {
	var best digest
	for _, c := range h.Values("WWW-Authenticate") {
		scheme, _, p, err := parseAuth(c)
		a, known := parseAlgorithm(p["algorithm"])
		qop := strings.Split(strings.ReplaceAll(p["qop"], " ", ""), ",")
		if err != nil || scheme != "digest" || !known || p["nonce"] == "" || !slices.Contains(qop, "auth") {
			continue
		}
		if best.nonce == "" || a == SHA256 && best.algorithm != SHA256 {
			best = digest{algorithm: a, realm: p["realm"], nonce: p["nonce"], opaque: p["opaque"]}
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if best.nonce != l.d.nonce {
		l.d, l.n = best, 0
	}
	return best.nonce != ""
}

// writeBuffer holds a request with a chunk of 64 KiB, which then goes out at once.
const writeBuffer = 96 << 10

func newHTTPChannel(u *url.URL, o *ClientOptions) (*httpChannel, error) {
	if o.Token != "" && o.User != "" {
		return nil, errors.New("both a token and a user")
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	t := &http.Transport{
		DialContext:         dialer.DialContext,
		WriteBufferSize:     writeBuffer,
		MaxIdleConnsPerHost: maxWindow, // each call under way has its own
		TLSHandshakeTimeout: 15 * time.Second,
		IdleConnTimeout:     5 * time.Second, // devices have few connections
		DisableCompression:  true,
	}
	c := &http.Client{Transport: t}
	switch u.Scheme {
	case "http", "https":
		if u.Host == "" {
			return nil, errors.New("no host")
		}
		if o.HTTPClient != nil {
			k := *o.HTTPClient
			c = &k
		}
	case "unix":
		path := u.Path
		if path == "" || u.Host != "" {
			return nil, errors.New("need unix:///PATH")
		}
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", path)
		}
		u = &url.URL{Scheme: "http", Host: "localhost"}
	default:
		return nil, fmt.Errorf("scheme %s: not known here", ota.Quote(u.Scheme))
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/rpc"
	}
	// A redirect would take the token, and the firmware, somewhere else.
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	h := &httpChannel{url: u.String(), token: o.Token, client: c}
	if o.User != "" {
		h.login = &headerLogin{user: o.User, password: o.Password}
	}
	return h, nil
}

func (h *httpChannel) Close() error {
	h.client.CloseIdleConnections()
	return nil
}

// Window returns how many calls a push may have under way, see [Channel].
func (h *httpChannel) Window() int { return maxWindow }

func (h *httpChannel) RoundTrip(ctx context.Context, frame []byte, max int) ([]byte, error) {
	res, err := h.post(ctx, frame)
	if err == nil && res.StatusCode == http.StatusUnauthorized && h.login != nil && h.login.challenged(res.Header) {
		// At the first call, and when the nonce has become too old.
		_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, maxAuthHeader)) // to use the connection again
		res.Body.Close()
		res, err = h.post(ctx, frame)
	}
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, int64(max)+1))
	switch {
	case err != nil:
		return nil, err
	case len(b) > max:
		return nil, fmt.Errorf("reply of more than %d bytes: %w", max, ota.ErrTooLarge)
	case res.StatusCode == http.StatusOK:
		return b, nil
	}
	e := &Error{Code: res.StatusCode}
	if json.Unmarshal(b, e) != nil || e.Code == 0 {
		*e = Error{Code: res.StatusCode, Message: "HTTP status " + res.Status}
		if text := strings.TrimSpace(string(b)); text != "" {
			e.Message += ": " + printable(text)
		}
	}
	return nil, e
}

// post sends a frame once. The transport gets a copy of it, since it may go on to
// read a body that nobody wants; and it gets a bytes.Reader, which it sends together
// with the headers.
func (h *httpChannel) post(ctx context.Context, frame []byte) (*http.Response, error) {
	body := append(h.spare.Get(len(frame)), frame...)
	var began, ended atomic.Int32 // to write it, once a connection
	req, err := http.NewRequestWithContext(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn:      func(httptrace.GotConnInfo) { began.Add(1) },
		WroteRequest: func(httptrace.WroteRequestInfo) { ended.Add(1) },
	}), http.MethodPost, h.url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Connection", "keep-alive") // devices close otherwise
	req.Header.Set("User-Agent", "ota")
	switch {
	case h.token != "":
		req.Header.Set("Authorization", "Bearer "+h.token)
	case h.login != nil:
		if a := h.login.header(req.Method, req.URL.RequestURI()); a != "" {
			req.Header.Set("Authorization", a)
		}
	}
	res, err := h.client.Do(req)
	if n := began.Load(); n > 0 && n == ended.Load() {
		h.spare.Put(body)
	}
	return res, err
}

// dialFailed reports whether err says that the call was never sent.
func dialFailed(err error) bool {
	var oe *net.OpError
	return errors.As(err, &oe) && oe.Op == "dial"
}
