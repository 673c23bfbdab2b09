// Package link has what transports with lasting connections share: matching
// replies with calls, and the pauses between attempts to connect.
package link

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"sync"
	"time"
)

// ID returns the id of a request. It reads no further than that, as what follows
// may be a long chunk of firmware.
func ID(frame []byte) (string, error) {
	d := json.NewDecoder(bytes.NewReader(frame))
	d.UseNumber()
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return "", errNoID
	}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return "", errNoID
		}
		if name != "id" {
			var skipped json.RawMessage
			if err := d.Decode(&skipped); err != nil {
				return "", errNoID
			}
			continue
		}
		switch id, _ := d.Token(); id := id.(type) {
		case json.Number:
			return id.String(), nil
		case string:
			if id != "" {
				return id, nil
			}
		}
		return "", errNoID
	}
	return "", errNoID
}

var errNoID = errors.New("a request without id")

// Calls are the calls that wait for replies on one connection. The zero value is
// ready for use, by any number of goroutines.
type Calls struct {
	mu      sync.Mutex
	waiting map[string]chan []byte
	err     error // why there will be no more replies
}

// ErrInUse says that a call of that id is waiting already.
var ErrInUse = errors.New("a call of this id is waiting")

// Add begins to wait for the reply to the call id. The channel gets the reply, or
// is closed by Fail. Remove must follow.
func (c *Calls) Add(id string) (<-chan []byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, c.err
	}
	if _, ok := c.waiting[id]; ok {
		return nil, ErrInUse
	}
	if c.waiting == nil {
		c.waiting = map[string]chan []byte{}
	}
	ch := make(chan []byte, 1)
	c.waiting[id] = ch
	return ch, nil
}

// Remove ends the wait for the call id.
func (c *Calls) Remove(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, id)
}

// Deliver hands over the reply to the call id, and reports whether that waited.
// Of several replies to a call the first one counts.
func (c *Calls) Deliver(id string, reply []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	ch, ok := c.waiting[id]
	if ok {
		delete(c.waiting, id)
		ch <- reply // has room
	}
	return ok
}

// Fail ends all waits, and later ones at once. The first reason counts.
func (c *Calls) Fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
	for id, ch := range c.waiting {
		delete(c.waiting, id)
		close(ch)
	}
}

// Err returns the reason that Fail was given, nil before.
func (c *Calls) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Backoff spaces out attempts: at first by Min to 2 Min, then twice as long each
// time, up to Max. What it is in that range is random, so that devices that lost
// their server together do not come back together.
type Backoff struct {
	Min, Max time.Duration
	next     time.Duration // the longest of the next pause
}

// Reset says that an attempt was a success.
func (b *Backoff) Reset() { b.next = 0 }

// Next returns the pause before the next attempt.
func (b *Backoff) Next() time.Duration {
	b.next = min(max(b.next, 2*b.Min), b.Max)
	d := b.next/2 + rand.N(b.next/2+1)
	b.next *= 2
	return d
}

// Wait waits for the next attempt. It returns the cause of ctx if that ends first.
func (b *Backoff) Wait(ctx context.Context) error {
	t := time.NewTimer(b.Next())
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Redial calls serve, which connects and serves until the connection is lost, again
// and again, with pauses between. A connection that lasted for Max lets them start
// anew. It returns the cause of ctx once that has ended, or the error of serve if
// that says that it is final.
func (b *Backoff) Redial(ctx context.Context, serve func() (final bool, err error)) error {
	for {
		begun := time.Now()
		final, err := serve()
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case final:
			return err
		}
		if time.Since(begun) >= b.Max {
			b.Reset()
		}
		if err := b.Wait(ctx); err != nil {
			return err
		}
	}
}
