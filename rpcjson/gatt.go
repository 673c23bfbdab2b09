package rpcjson

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/slotota/ota"
)

// The service and its characteristics that carry frames over Bluetooth Low Energy
// (mongoose-os-libs/rpc-gatts, README.md).
const (
	GATTService = "5f6d4f53-5f52-5043-5f53-56435f49445f"
	GATTData    = "5f6d4f53-5f52-5043-5f64-6174615f5f5f" // written: a request; read: the reply
	GATTTxCtl   = "5f6d4f53-5f52-5043-5f74-785f63746c5f" // written: length of the request
	GATTRxCtl   = "5f6d4f53-5f52-5043-5f72-785f63746c5f" // read, notified: length of the reply
)

// maxGATT bounds the calls of one central that are served, or whose replies wait
// to be read.
const maxGATT = 4

// ErrGATT says that a central does not keep to the protocol: lengths are four
// bytes, big-endian, and the pieces of a frame add up to it exactly.
var ErrGATT = errors.New("rpcjson: unexpected write to a characteristic")

// GATTServer serves one central that is connected to the service of a Bluetooth
// Low Energy peripheral, whose stack calls its methods; they do not block and may
// be called concurrently.
type GATTServer struct {
	s      *Server
	peer   Peer
	notify func(value []byte)
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	want    int      // length of the request being written, 0 if there is none
	got     []byte   // of it
	calls   int      // being served
	replies [][]byte // to be read; the first one perhaps in part already

	due, notifying bool // the first reply is to be notified of; somebody does that
}

// NewGATTServer returns a server for a central that has just connected. Its Close
// must be called when it disconnects, or if ctx ends. Channel of peer is GATTS if
// it has none. notify, if not nil, is called with the value of GATTRxCtl when
// there is another reply to be read: as soon as it is there, or the one before has
// been read. It should send a notification, may block, and is not called
// concurrently.
//
// Pairing is the business of the stack; the [Authorizer] is asked about each call.
func (s *Server) NewGATTServer(ctx context.Context, peer Peer, notify func(value []byte)) *GATTServer {
	if peer.Channel == "" {
		peer.Channel = "GATTS"
	}
	g := &GATTServer{s: s, peer: peer, notify: notify}
	g.ctx, g.cancel = context.WithCancel(ctx)
	return g
}

// Close ends the calls under way and waits for them. Replies that are there can
// still be read.
func (g *GATTServer) Close() error {
	g.mu.Lock()
	g.cancel()
	g.mu.Unlock()
	g.wg.Wait()
	return nil
}

// Write takes a value that was written to GATTTxCtl or GATTData. The error wraps
// [ErrGATT], and [ota.ErrTooLarge] or [ota.ErrBusy] where that is the reason. After
// Close, or once the context has ended, it is the cause of that.
func (g *GATTServer) Write(characteristic string, value []byte) error {
	g.mu.Lock()
	defer g.mu.Unlock() // Close waits for what was begun before it, and nothing is begun after it
	if g.ctx.Err() != nil {
		return context.Cause(g.ctx)
	}
	frame, err := g.take(characteristic, value)
	if err != nil || frame == nil {
		return err
	}
	g.calls++
	g.wg.Go(func() {
		var reply []byte
		if err := g.s.Serve(g.ctx, g.peer, frame, func(b []byte) error { reply = b; return nil }); err != nil {
			g.s.log.Debug("rpc: frame not answered", "channel", g.peer.Channel, "peer", g.peer.Addr, "err", err)
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		g.calls--
		if reply != nil {
			g.replies = append(g.replies, reply)
		}
		if reply != nil && len(g.replies) == 1 {
			g.announce()
		}
	})
	return nil
}

// announce has the central notified of the next reply. g.mu is held.
func (g *GATTServer) announce() {
	if g.notify == nil || g.ctx.Err() != nil {
		return
	}
	g.due = true
	if !g.notifying {
		g.notifying = true
		g.wg.Go(g.notifyAll)
	}
}

// notifyAll notifies as long as there is something to notify of: one goroutine,
// for order, and none of the stack's, which has to send what was read first.
func (g *GATTServer) notifyAll() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.due && g.ctx.Err() == nil {
		g.due = false
		if len(g.replies) > 0 {
			value := binary.BigEndian.AppendUint32(nil, uint32(len(g.replies[0])))
			g.mu.Unlock()
			g.notify(value)
			g.mu.Lock()
		}
	}
	g.notifying = false
}

// take adds to the request and returns it once it is complete. g.mu is held.
func (g *GATTServer) take(characteristic string, value []byte) ([]byte, error) {
	switch characteristic {
	case GATTTxCtl:
		g.want, g.got = 0, nil
		if len(value) != 4 {
			return nil, fmt.Errorf("%w: length of %d bytes, need 4", ErrGATT, len(value))
		}
		n := binary.BigEndian.Uint32(value)
		switch {
		case n == 0 || int64(n) > int64(g.s.o.MaxFrame):
			return nil, fmt.Errorf("%w: frame of %d bytes, at most %d: %w", ErrGATT, n, g.s.o.MaxFrame, ota.ErrTooLarge)
		case g.calls+len(g.replies) >= maxGATT:
			return nil, fmt.Errorf("%w: %d replies are not yet read: %w", ErrGATT, maxGATT, ota.ErrBusy)
		}
		g.want = int(n)
		return nil, nil
	case GATTData:
		if len(g.got)+len(value) > g.want {
			have := len(g.got) + len(value)
			want := g.want
			g.want, g.got = 0, nil
			return nil, fmt.Errorf("%w: %d bytes of a frame of %d", ErrGATT, have, want)
		}
		g.got = append(g.got, value...) // grows with what comes, not with what is announced
		if len(g.got) < g.want || g.want == 0 {
			return nil, nil
		}
		frame := g.got
		g.want, g.got = 0, nil
		return frame, nil
	}
	return nil, fmt.Errorf("%w: %s cannot be written", ErrGATT, ota.Quote(characteristic))
}

// Read returns the value of GATTRxCtl, or the next at most n bytes of the reply
// for GATTData; none if there is none.
func (g *GATTServer) Read(characteristic string, n int) ([]byte, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var first []byte
	if len(g.replies) > 0 {
		first = g.replies[0]
	}
	switch characteristic {
	case GATTRxCtl:
		return binary.BigEndian.AppendUint32(nil, uint32(len(first))), nil
	case GATTData:
		n = max(0, min(n, len(first)))
		if n == len(first) && n > 0 {
			g.replies = slices.Delete(g.replies, 0, 1)
			if len(g.replies) > 0 {
				g.announce()
			}
		} else if n > 0 {
			g.replies[0] = first[n:]
		}
		return first[:n:n], nil
	}
	return nil, fmt.Errorf("%w: %s cannot be read", ErrGATT, ota.Quote(characteristic))
}

// GATTCentral is what a client needs of a connection to a peripheral. The methods
// are not called concurrently.
type GATTCentral interface {
	// WriteCharacteristic writes value with response. It is no longer than
	// the size given to NewGATT.
	WriteCharacteristic(ctx context.Context, uuid string, value []byte) error
	// ReadCharacteristic reads as much as one read gives.
	ReadCharacteristic(ctx context.Context, uuid string) ([]byte, error)
	Close() error
}

// GATT is a [Channel] over the characteristics of a peripheral. One call is under
// way at a time.
type GATT struct {
	c    GATTCentral
	size int
	busy chan struct{} // holds an element during a call
	wake chan struct{} // gets an element for a notification
}

// gattPoll is how often the length of the reply is asked for.
const gattPoll = 100 * time.Millisecond

// NewGATT returns a channel over c. size is how many bytes one write can carry:
// the MTU of the connection less three; 0 means 20, which always works.
func NewGATT(c GATTCentral, size int) *GATT {
	if size <= 0 {
		size = 20
	}
	return &GATT{c: c, size: min(size, 512), busy: make(chan struct{}, 1), wake: make(chan struct{}, 1)}
}

// Notified says that a notification of GATTRxCtl has come. Without it the channel
// asks ten times a second whether there is a reply.
func (g *GATT) Notified() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// ChunkSize returns the size of chunks that fits into the frames of the original.
func (g *GATT) ChunkSize() int { return 2048 }

// Close closes the connection.
func (g *GATT) Close() error { return g.c.Close() }

// RoundTrip implements [Channel].
func (g *GATT) RoundTrip(ctx context.Context, frame []byte, max int) ([]byte, error) {
	select {
	case g.busy <- struct{}{}:
		defer func() { <-g.busy }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	id, _ := frameID(frame)
	frame = bytes.TrimSpace(frame)
	if err := g.c.WriteCharacteristic(ctx, GATTTxCtl, binary.BigEndian.AppendUint32(nil, uint32(len(frame)))); err != nil {
		return nil, err
	}
	for piece := range slices.Chunk(frame, g.size) {
		if err := g.c.WriteCharacteristic(ctx, GATTData, piece); err != nil {
			return nil, err
		}
	}
	for {
		reply, err := g.receive(ctx, max)
		if err != nil {
			return nil, err
		}
		// It may be the reply to an earlier call, which nobody waits for.
		if got, method := frameID(reply); got == id && method == "" {
			return reply, nil
		}
	}
}

// receive waits for a reply and reads it.
func (g *GATT) receive(ctx context.Context, max int) ([]byte, error) {
	for {
		b, err := g.c.ReadCharacteristic(ctx, GATTRxCtl)
		if err != nil {
			return nil, err
		}
		if len(b) != 4 {
			return nil, fmt.Errorf("%w: length of %d bytes", ErrBadReply, len(b))
		}
		if n := binary.BigEndian.Uint32(b); n > 0 {
			return g.readReply(ctx, int64(n), max)
		}
		t := time.NewTimer(gattPoll)
		select {
		case <-t.C:
		case <-g.wake:
		case <-ctx.Done():
		}
		t.Stop()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
}

// readReply reads the n bytes of a reply; all of them, also if they are too many,
// so that the next reply can be read.
func (g *GATT) readReply(ctx context.Context, n int64, max int) ([]byte, error) {
	var reply []byte
	for have := int64(0); have < n; {
		b, err := g.c.ReadCharacteristic(ctx, GATTData)
		if err != nil {
			return nil, err
		}
		have += int64(len(b))
		if len(b) == 0 || have > n {
			return nil, fmt.Errorf("%w: %d bytes, said to be %d", ErrBadReply, have, n)
		}
		if n <= int64(max) {
			reply = append(reply, b...)
		}
	}
	if n > int64(max) {
		return nil, errTooLongReply(max)
	}
	return reply, nil
}
