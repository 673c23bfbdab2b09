// Package watchdog is the watchdog of Linux, /dev/watchdog: a timer, mostly in
// hardware, that resets the machine unless it is fed in time. Package ota holds it
// during the trial of a new firmware:
//
//	opts.Watchdog = watchdog.For("/dev/watchdog", &watchdog.Options{Timeout: 30 * time.Second})
//
// Where the service manager feeds the watchdog already (systemd's
// RuntimeWatchdogSec), it cannot be opened a second time, and need not be: a health
// check notices a daemon that fails, and the manager a kernel that hangs.
//
// The interface is that of torvalds/linux, Documentation/watchdog/watchdog-api.rst.
// On other systems Open returns an error that wraps ota.ErrUnsupported.
package watchdog

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/slotota/ota"
)

// ErrNoWayOut is wrapped by the error of [Watchdog.Disarm] if the driver does not
// let anybody stop the watchdog (nowayout). It resets the machine unless somebody
// goes on feeding it.
var ErrNoWayOut = errors.New("the watchdog cannot be stopped")

// Options configure a [Watchdog]. The zero value leaves the timeout as it is and
// stops the watchdog after the trial.
type Options struct {
	// Timeout is how long it waits to be fed, in whole seconds, rounded up. 0
	// leaves what the driver or the boot loader has set. Hardware rounds, or has
	// an upper bound: Watchdog.Timeout returns what it made of it.
	Timeout time.Duration
	// KeepRunning makes Disarm leave the watchdog running, for another program
	// that opens it and feeds it from then on.
	KeepRunning bool
}

// Watchdog is an open watchdog; it implements [ota.Watchdog]. It was started by
// opening it. Methods must not be called concurrently.
type Watchdog struct {
	p       port
	o       Options
	timeout time.Duration
	info    Info
	closed  bool
}

// Info is what the driver says.
type Info struct {
	// Identity names the driver or the hardware.
	Identity string
	// Reset says that this watchdog has caused the last boot, as far as the
	// hardware knows.
	Reset bool
	// Pretimeout and MagicClose say what the driver can: warn before it resets, and
	// be stopped by those who say so only. Without MagicClose closing stops it.
	Pretimeout, MagicClose bool
}

// port is what the kernel does.
type port interface {
	support() (options uint32, identity string, err error)
	bootStatus() (uint32, error)
	setTimeout(seconds int32) (int32, error)
	timeout() (int32, error)
	keepalive() error
	disable() error // fails with errBusy if the driver refuses for good
	write(b byte) error
	close() error
}

// Bits of the options; include/uapi/linux/watchdog.h.
const (
	cardReset  = 0x20
	settable   = 0x80
	magicClose = 0x100
	pretimeout = 0x200
)

// errBusy is the refusal of a driver with nowayout.
var errBusy = errors.New("busy")

// For returns a function for [ota.Options], which opens the watchdog when a trial
// begins.
func For(path string, o *Options) func(context.Context) (ota.Watchdog, error) {
	return func(context.Context) (ota.Watchdog, error) {
		w, err := Open(path, o)
		if err != nil {
			return nil, err
		}
		return w, nil
	}
}

// Open opens the watchdog at path, "" for /dev/watchdog, which starts it. The
// error wraps EBUSY if another program has it. If the timeout cannot be set the
// watchdog is stopped again, as far as that is possible.
func Open(path string, o *Options) (*Watchdog, error) {
	if path == "" {
		path = "/dev/watchdog"
	}
	if o == nil {
		o = &Options{}
	}
	if o.Timeout < 0 || o.Timeout > math.MaxInt32*time.Second {
		return nil, fmt.Errorf("watchdog: timeout %v: %w", o.Timeout, ota.ErrInvalid)
	}
	p, err := openPort(path)
	if err != nil {
		return nil, fmt.Errorf("watchdog: %w", err)
	}
	w, err := start(p, o)
	if err != nil {
		return nil, fmt.Errorf("watchdog: %s: %w", strconv.Quote(path), err)
	}
	return w, nil
}

func start(p port, o *Options) (*Watchdog, error) {
	w := &Watchdog{p: p, o: *o}
	options, identity, err := p.support()
	if err == nil {
		w.info = Info{Identity: identity, Pretimeout: options&pretimeout != 0, MagicClose: options&magicClose != 0}
		if b, err := p.bootStatus(); err == nil {
			w.info.Reset = b&cardReset != 0
		}
		if err = w.setTimeout(options); err == nil {
			// Feeds it, and makes the kernel forget a magic character that the one
			// before has left.
			err = p.write(0)
		}
	}
	if err != nil {
		return nil, errors.Join(err, w.stop(), p.close())
	}
	return w, nil
}

func (w *Watchdog) setTimeout(options uint32) error {
	var n int32
	var err error
	if want := int32((w.o.Timeout + time.Second - 1) / time.Second); want > 0 && options&settable != 0 {
		if n, err = w.p.setTimeout(want); err != nil {
			return fmt.Errorf("timeout of %v: %w", w.o.Timeout, err)
		}
	}
	// Drivers may choose another one than they return at first.
	if now, err := w.p.timeout(); err == nil {
		n = now
	}
	if n <= 0 {
		return fmt.Errorf("the driver does not tell its timeout: %w", ota.ErrUnsupported)
	}
	w.timeout = time.Duration(n) * time.Second
	return nil
}

// Info returns what the driver says.
func (w *Watchdog) Info() Info { return w.info }

// Timeout returns how long the watchdog waits to be fed; this may be more or less
// than Options asked for.
func (w *Watchdog) Timeout() time.Duration { return w.timeout }

// Keepalive feeds the watchdog.
func (w *Watchdog) Keepalive(context.Context) error {
	if err := w.p.keepalive(); err != nil {
		return fmt.Errorf("watchdog: keepalive: %w", err)
	}
	return nil
}

// Disarm stops the watchdog, unless Options.KeepRunning is set: it then feeds it
// once more. The error wraps [ErrNoWayOut] if it runs on.
func (w *Watchdog) Disarm(ctx context.Context) error {
	if w.o.KeepRunning {
		return w.Keepalive(ctx)
	}
	if err := w.stop(); err != nil {
		return errors.Join(fmt.Errorf("watchdog: %w", err), w.Keepalive(ctx))
	}
	return nil
}

// stop stops the watchdog, in the way that tells whether it could.
func (w *Watchdog) stop() error {
	err := w.p.disable()
	if errors.Is(err, errBusy) {
		return ErrNoWayOut
	}
	if err == nil {
		return nil
	}
	// A driver that does not know how to be disabled knows the magic character, at
	// Close. One that was disabled must not see it: the kernel would remember it for
	// whoever opens the watchdog next.
	if werr := w.p.write('V'); werr != nil {
		return errors.Join(err, werr)
	}
	return nil
}

// Close closes the watchdog. Unless Disarm has stopped it, it runs on, and resets
// the machine if nobody opens it and feeds it within Timeout; a driver without
// MagicClose stops.
func (w *Watchdog) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	if err := w.p.close(); err != nil {
		return fmt.Errorf("watchdog: %w", err)
	}
	return nil
}
