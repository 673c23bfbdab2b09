package ws

import (
	"context"
	"net"
	"time"
)

// coalesced bounds what is held back, in bytes: a message with a chunk of 64 KiB.
const coalesced = 96 << 10

// coalescer is a connection whose writes can be held back. The library writes a
// message in pieces of 4 KiB, each of which wakes the reader.
type coalescer struct {
	net.Conn
	lock  chan struct{} // of capacity one: held during a write, and for what follows
	holds int
	buf   []byte
}

func newCoalescer(c net.Conn) *coalescer {
	return &coalescer{Conn: c, lock: make(chan struct{}, 1)}
}

// Write implements net.Conn.
func (c *coalescer) Write(p []byte) (int, error) {
	c.lock <- struct{}{}
	defer func() { <-c.lock }()
	if c.holds > 0 && len(c.buf)+len(p) <= coalesced {
		if c.buf == nil {
			c.buf = make([]byte, 0, coalesced)
		}
		c.buf = append(c.buf, p...)
		return len(p), nil
	}
	if err := c.flush(); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// hold holds back what is written until release, unless ctx ends first.
func (c *coalescer) hold(ctx context.Context) error {
	select {
	case c.lock <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	c.holds++
	<-c.lock
	return nil
}

// release writes what was held back, until ctx ends.
func (c *coalescer) release(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = c.Conn.SetWriteDeadline(time.Unix(1, 0)) })()
	c.lock <- struct{}{}
	defer func() { <-c.lock }()
	c.holds--
	return c.flush()
}

func (c *coalescer) flush() error {
	if len(c.buf) == 0 {
		return nil
	}
	_, err := c.Conn.Write(c.buf)
	c.buf = c.buf[:0]
	return err
}
