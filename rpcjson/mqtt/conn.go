package mqtt

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	paho "github.com/eclipse/paho.mqtt.golang"
	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/slotota/ota"
	"github.com/slotota/ota/rpcjson"
)

// Time limits.
const (
	connectTimeout = 20 * time.Second
	ackTimeout     = 20 * time.Second // for a subscription
	writeTimeout   = 30 * time.Second // of 4 KiB
	keepAlive      = 20 * time.Second // the broker is asked after silence
	pingTimeout    = 10 * time.Second
	lastTimeout    = time.Second // the same, at the end
	closeTimeout   = 5 * time.Second
	// settleTime is left to the broker between two connections of which the first
	// was to make it forget: some forget only when that has long ended, and then
	// who has the same client id now (mochi-mqtt/server, server.go, attachClient).
	settleTime = 200 * time.Millisecond
	// handOver is how long a message waits for the library to take it. It is
	// long if others are being sent.
	handOver = 5 * time.Second
)

// conn is one connection to the broker, without any memory of others.
type conn struct {
	client  paho.Client
	resumed bool // the broker still knows the session

	mu  sync.Mutex
	raw *limitedConn
	err error

	lost     chan struct{} // closed when the connection has ended by itself
	lostOnce sync.Once
}

// connConfig is what differs between connections.
type connConfig struct {
	clean     bool // forget the session of this client id
	will      string
	willTopic string
	ackLater  bool // onMessage acknowledges
	// onMessage gets each message, one after the other. It must not block.
	onMessage func(paho.Message)
	// maxPayload returns the size of the largest message that is wanted. Of a
	// larger one, more than that arrives, but not all.
	maxPayload func() int
}

// connect opens a connection. An error of type *rpcjson.Error is what the broker
// answered.
func (b *broker) connect(ctx context.Context, cfg connConfig) (*conn, error) {
	c := &conn{lost: make(chan struct{})}
	o := paho.NewClientOptions()
	o.Servers = []*url.URL{{Scheme: "tcp", Host: b.addr}} // for the library's records
	o.SetCustomOpenConnectionFn(func(*url.URL, paho.ClientOptions) (net.Conn, error) {
		nc, err := b.open(ctx)
		if err != nil {
			return nil, err
		}
		raw := newLimitedConn(nc, cfg.maxPayload)
		c.mu.Lock()
		c.raw = raw
		c.mu.Unlock()
		if ctx.Err() != nil { // perhaps too late for closeRaw
			raw.Close()
			return nil, context.Cause(ctx)
		}
		return raw, nil
	})
	o.SetClientID(b.clientID)
	o.SetUsername(b.username)
	o.SetPassword(b.password)
	o.SetCleanSession(cfg.clean)
	o.SetProtocolVersion(4) // without this the library tries 3.1 after a refusal
	o.SetConnectTimeout(connectTimeout)
	o.SetKeepAlive(keepAlive)
	o.SetPingTimeout(pingTimeout)
	o.SetWriteTimeout(handOver)
	o.SetAutoReconnect(false)
	o.SetAutoAckDisabled(cfg.ackLater)
	o.SetDefaultPublishHandler(func(_ paho.Client, m paho.Message) { cfg.onMessage(m) })
	o.SetConnectionLostHandler(func(_ paho.Client, err error) { c.fail(err) })
	if cfg.willTopic != "" {
		o.SetWill(cfg.willTopic, cfg.will, 1, true)
	}
	c.client = paho.NewClient(o)

	stop := context.AfterFunc(ctx, c.closeRaw)
	t := c.client.Connect().(*paho.ConnectToken)
	<-t.Done() // within connectTimeout, or soon after ctx
	if err := t.Error(); err != nil {
		stop()
		c.closeRaw()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, refusal(t.ReturnCode(), err)
	}
	c.resumed = t.SessionPresent()
	if !stop() {
		c.close()
		return nil, context.Cause(ctx)
	}
	return c, nil
}

// open opens the network connection.
func (b *broker) open(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	c, err := b.dial(ctx, "tcp", b.addr)
	if err != nil || b.tls == nil {
		return c, err
	}
	t := tls.Client(c, b.tls)
	if err := t.HandshakeContext(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return t, nil
}

// refusal makes an error of a return code (MQTT 3.1.1, section 3.2.2.3).
func refusal(code byte, err error) error {
	e := &rpcjson.Error{Message: "MQTT broker: " + err.Error()}
	switch code {
	case packets.ErrRefusedBadUsernameOrPassword, packets.ErrRefusedNotAuthorised:
		e.Code = 401
	case packets.ErrRefusedServerUnavailable:
		e.Code = 503
	case packets.ErrRefusedIDRejected, packets.ErrRefusedBadProtocolVersion:
		e.Code = 400
	default:
		return err
	}
	return e
}

// fail notes that the connection has ended by itself.
func (c *conn) fail(err error) {
	c.lostOnce.Do(func() {
		c.mu.Lock()
		c.err = fmt.Errorf("connection to the MQTT broker lost: %w", err)
		c.mu.Unlock()
		close(c.lost)
	})
}

// reason returns why the connection was lost.
func (c *conn) reason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *conn) closeRaw() {
	if raw := c.limited(); raw != nil {
		raw.Close()
	}
}

func (c *conn) limited() *limitedConn {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.raw
}

// hurry gives what is being sent, and what comes after it, little time.
func (c *conn) hurry() {
	l := c.limited()
	l.limit.Store(int64(lastTimeout))
	_ = l.Conn.SetWriteDeadline(time.Now().Add(lastTimeout))
}

// close ends the connection and what the library does with it.
func (c *conn) close() {
	c.client.Disconnect(250)
	c.closeRaw() // whatever still is stuck there
	c.client.Disconnect(uint(closeTimeout / time.Millisecond))
}

// wait waits for an answer of the broker.
func (c *conn) wait(ctx context.Context, t paho.Token) error {
	select {
	case <-t.Done():
		return t.Error()
	case <-c.lost:
		return c.reason()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// subscribe asks for messages. The error is an *rpcjson.Error if the broker
// refuses.
func (c *conn) subscribe(ctx context.Context, filter string) error {
	ctx, cancel := context.WithTimeout(ctx, ackTimeout)
	defer cancel()
	t := c.client.Subscribe(filter, 1, nil).(*paho.SubscribeToken)
	if err := c.wait(ctx, t); err != nil {
		return err
	}
	if qos, ok := t.Result()[filter]; !ok || qos > 2 {
		return &rpcjson.Error{Code: 403, Message: "MQTT broker: subscription to " + ota.Quote(filter) + " refused"}
	}
	return nil
}

// publish sends a message and waits until the broker has it.
func (c *conn) publish(ctx context.Context, topic string, retained bool, payload []byte) error {
	return c.wait(ctx, c.client.Publish(topic, 1, retained, payload))
}

// limitedConn is a connection to a broker that bounds what it makes the library
// allocate: that allocates as much as the header of a packet says. Of messages
// that are too long only the beginning gets through, because an error would make
// the broker send them again, to the next connection.
type limitedConn struct {
	net.Conn
	r       *bufio.Reader
	max     func() int
	writing chan struct{} // of capacity one: held during a Write
	limit   atomic.Int64  // the time for that, in nanoseconds

	head       [5]byte // of the packet
	out        []byte  // what of it has not been read
	pass, skip int     // bytes after that
}

func newLimitedConn(c net.Conn, max func() int) *limitedConn {
	l := &limitedConn{Conn: c, r: bufio.NewReader(c), max: max, writing: make(chan struct{}, 1)}
	l.limit.Store(int64(writeTimeout))
	return l
}

// Packet types (MQTT 3.1.1, section 2.2.1).
const (
	typePublish = 3
	typeSuback  = 9
)

var errPacket = errors.New("malformed packet from the MQTT broker")

// Read implements io.Reader.
func (c *limitedConn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		switch {
		case len(c.out) > 0:
			n := copy(p, c.out)
			c.out = c.out[n:]
			return n, nil
		case c.pass > 0:
			n, err := c.r.Read(p[:min(len(p), c.pass)])
			c.pass -= n
			return n, err
		case c.skip > 0:
			n, err := c.r.Discard(min(c.skip, 1<<16))
			c.skip -= n
			if err != nil {
				return 0, err
			}
		default:
			if err := c.next(); err != nil {
				return 0, err
			}
		}
	}
}

// next reads the header of the next packet.
func (c *limitedConn) next() error {
	first, err := c.r.ReadByte()
	if err != nil {
		return err
	}
	size := 0
	for i := 0; ; i++ {
		if i == 4 {
			return errPacket
		}
		b, err := c.r.ReadByte()
		if err != nil {
			return noEOF(err)
		}
		size |= int(b&0x7f) << (7 * i)
		if b < 0x80 {
			break
		}
	}
	limit := 64 // what others than messages need
	switch first >> 4 {
	case typePublish:
		limit = 2 + 65535 + 2 + c.max() + 1 // topic, packet id, and a byte that is too much
	case typeSuback:
		if size != 3 { // the library relies on one answer for each filter
			return errPacket
		}
	}
	if size > limit {
		if first>>4 != typePublish {
			return errPacket
		}
		c.skip = size - limit
		size = limit
	}
	c.pass = size
	c.out = append(c.head[:0], first)
	for {
		b := byte(size & 0x7f)
		if size >>= 7; size == 0 {
			c.out = append(c.out, b)
			return nil
		}
		c.out = append(c.out, b|0x80)
	}
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Write implements io.Writer. It fails if nothing moves for limit. A packet
// stays in one piece, although the library sends pings beside others.
func (c *limitedConn) Write(p []byte) (n int, err error) {
	c.writing <- struct{}{}
	defer func() { <-c.writing }()
	for {
		if err := c.Conn.SetWriteDeadline(time.Now().Add(time.Duration(c.limit.Load()))); err != nil {
			return n, err
		}
		k, err := c.Conn.Write(p[n:min(len(p), n+4096)])
		n += k
		if err != nil || n == len(p) {
			return n, err
		}
	}
}

// SetWriteDeadline does nothing: Write has deadlines of its own, and the library
// would give a long message as little time as a short one.
func (c *limitedConn) SetWriteDeadline(time.Time) error { return nil }
