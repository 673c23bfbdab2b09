package mqtt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"

	paho "github.com/eclipse/paho.mqtt.golang"

	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/link"
	"github.com/slotota/ota/rpcjson"
)

// Channel carries the calls of a [rpcjson.Client] to one device, over a connection
// to its broker that it opens when there is something to send, also after the last
// one broke. Its methods may be called concurrently.
type Channel struct {
	b      *broker
	device string
	src    string

	opening chan struct{} // of capacity one: held to open a connection
	mu      sync.Mutex    // guards what follows
	conn    *clientConn   // the last one; nil before the first
	closed  bool
}

// clientConn is a connection that calls go over.
type clientConn struct {
	*conn
	calls    link.Calls
	maxReply atomic.Int64
}

// Dial returns a channel to the device of the id ID at the broker at rawURL:
//
//	mqtt://[USER:PASSWORD@]HOST[:PORT]/ID     port 1883 unless given
//	mqtts://[USER:PASSWORD@]HOST[:PORT]/ID    port 8883 unless given
//
// Replies come to ID/rpc-resp/CLIENT/rpc, where CLIENT is the client id; the
// broker must allow that subscription. Nothing is sent yet. Errors wrap
// [ota.ErrInvalid]. o may be nil.
func Dial(_ context.Context, rawURL string, o *DialOptions) (*Channel, error) {
	if o == nil {
		o = &DialOptions{}
	}
	b, device, err := newBroker(rawURL, o)
	if err != nil {
		return nil, err
	}
	if err := checkTopic(device); err != nil {
		return nil, fmt.Errorf("mqtt: device id %s at the end of the URL: %w: %w", ota.Quote(device), err, ota.ErrInvalid)
	}
	if b.clientID == "" {
		b.clientID = fmt.Sprintf("ota-%016x", rand.Uint64())
	}
	src := device + "/rpc-resp/" + b.clientID
	if err := checkTopic(src); err != nil {
		return nil, fmt.Errorf("mqtt: ClientID %s: %w: %w", ota.Quote(b.clientID), err, ota.ErrInvalid)
	}
	return &Channel{b: b, device: device, src: src, opening: make(chan struct{}, 1)}, nil
}

// Addresses implements [rpcjson.Addresser].
func (ch *Channel) Addresses() (src, dst string) { return ch.src, ch.device }

// onMessage takes a reply.
func (cc *clientConn) onMessage(m paho.Message) {
	if m.Retained() {
		return
	}
	// Of a reply that is too long this is the beginning, with the id.
	b := m.Payload()
	h, err := rpcjson.ParseHeader(b)
	if err != nil || h.Method != "" {
		return
	}
	if int64(len(b)) > cc.maxReply.Load() {
		b = nil
	}
	cc.calls.Deliver(h.ID, b)
}

var errClosed = errors.New("mqtt: channel closed")

// connection returns the open connection, or a new one.
func (ch *Channel) connection(ctx context.Context, maxReply int) (*clientConn, error) {
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
	cc := &clientConn{}
	cc.maxReply.Store(int64(maxReply))
	c, err := ch.b.connect(ctx, connConfig{
		clean:      true,
		onMessage:  cc.onMessage,
		maxPayload: func() int { return int(cc.maxReply.Load()) },
	})
	if err != nil {
		return nil, err
	}
	cc.conn = c
	if err := c.subscribe(ctx, ch.src+"/rpc"); err != nil {
		c.close()
		return nil, err
	}
	ch.mu.Lock()
	closed := ch.closed
	if !closed {
		ch.conn = cc
	}
	ch.mu.Unlock()
	if closed {
		c.close()
		return nil, errClosed
	}
	return cc, nil
}

// current returns the connection if it is open.
func (ch *Channel) current() (*clientConn, error) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if ch.closed {
		return nil, errClosed
	}
	if ch.conn != nil {
		select {
		case <-ch.conn.lost:
		default:
			return ch.conn, nil
		}
	}
	return nil, nil
}

// RoundTrip implements [rpcjson.Channel].
func (ch *Channel) RoundTrip(ctx context.Context, frame []byte, max int) ([]byte, error) {
	id, err := link.ID(frame)
	if err != nil {
		return nil, err
	}
	cc, err := ch.connection(ctx, max)
	if err != nil {
		return nil, err
	}
	cc.maxReply.Store(int64(max))
	reply, err := cc.calls.Add(id)
	if err != nil {
		return nil, err
	}
	defer cc.calls.Remove(id)
	// The reply says more than the acknowledgement of the broker.
	t := cc.client.Publish(ch.device+"/rpc", 1, false, bytes.Clone(frame)) // the library keeps it
	select {
	case <-t.Done():
		if err := t.Error(); err != nil {
			return nil, err
		}
	default:
	}
	select {
	case b, ok := <-reply:
		switch {
		case !ok:
			return nil, cc.calls.Err()
		case b == nil:
			return nil, fmt.Errorf("reply of more than %d bytes: %w", max, ota.ErrTooLarge)
		}
		return b, nil
	case <-cc.lost:
		return nil, cc.reason()
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
		cc.close()
	}
	return nil
}
