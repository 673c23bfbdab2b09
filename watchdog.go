package ota

import (
	"context"
	"errors"
	"time"
)

// Watchdog is a timer that resets the device unless it is fed in time. Package
// watchdog has that of Linux. Methods are not called concurrently.
type Watchdog interface {
	// Timeout is how long it waits to be fed.
	Timeout() time.Duration
	// Keepalive feeds it.
	Keepalive(ctx context.Context) error
	// Disarm ends it, or hands it to whoever feeds it from now on: the firmware
	// is committed. Close follows.
	Disarm(ctx context.Context) error
	// Close gives up access. A watchdog that was not disarmed goes on and
	// resets the device unless somebody opens and feeds it.
	Close() error
}

// guard is the watchdog of one trial; it feeds from the goroutine of Watch, so that
// a hang there is noticed too. Its zero value feeds nothing.
type guard struct {
	d     *Device
	w     Watchdog
	every time.Duration
	fed   time.Time
}

// guard starts the watchdog, if there is one.
func (d *Device) guard(ctx context.Context) *guard {
	g := &guard{d: d}
	if d.o.Watchdog == nil {
		return g
	}
	w, err := d.o.Watchdog(ctx)
	if err != nil {
		// The firmware is not to blame, and the other slot has no better one.
		d.o.Logger.Error("the trial is not guarded by a watchdog", "err", err)
		return g
	}
	g.w, g.every = w, max(w.Timeout()/4, 10*time.Millisecond)
	g.feed(ctx)
	return g
}

// feed keeps the device from being reset for the next Timeout.
func (g *guard) feed(ctx context.Context) {
	if g.w == nil {
		return
	}
	g.fed = time.Now()
	if err := g.w.Keepalive(ctx); err != nil {
		g.d.o.Logger.Error("the watchdog could not be fed", "err", err)
	}
}

// due returns when feed must be called next; never, without a watchdog.
func (g *guard) due() <-chan time.Time {
	if g.w == nil {
		return nil
	}
	return time.After(max(g.every-time.Since(g.fed), 0))
}

// release ends the guard: the trial is over with verdict err.
func (g *guard) release(ctx context.Context, err error) {
	if g.w == nil {
		return
	}
	off := err != nil && ctx.Err() != nil
	ctx = context.WithoutCancel(ctx)
	if !off && !errors.Is(err, ErrReverted) { // committed, or there is nothing to go back to
		if err := g.w.Disarm(ctx); err != nil {
			g.d.o.Logger.Error("the watchdog could not be disarmed, and will reset the device unless it is fed", "err", err)
		}
	} else {
		// Reverted: it shall end a reboot that hangs. Called off: it gives the
		// process that continues the trial time to start.
		g.feed(ctx)
	}
	if err := g.w.Close(); err != nil {
		g.d.o.Logger.Error("the watchdog could not be closed", "err", err)
	}
}
