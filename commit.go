package ota

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Commit declares the firmware on trial good: from then on no timer, no reset
// and no late message takes the device back. It applies to the running firmware
// only, whatever the boot state selects, and not after the commit timeout has
// expired. ErrCommitted says that there is nothing to commit.
//
// With Options.RequireTrialID only [Device.CommitTrial] commits.
func (d *Device) Commit(ctx context.Context) error { return d.commit(ctx, TrialID{}) }

// CommitTrial is like Commit, but approves the trial id only: a message that
// was meant for an earlier trial changes nothing. Committing the same trial
// again succeeds.
func (d *Device) CommitTrial(ctx context.Context, id TrialID) error {
	if id == (TrialID{}) {
		return opErr("commit", NoSlot, fmt.Errorf("no trial named: %w", ErrWrongTrial))
	}
	return d.commit(ctx, id)
}

// commit approves trial id, or with the zero id whichever is under way.
func (d *Device) commit(ctx context.Context, id TrialID) error {
	const op = "commit"
	if err := d.begin(ctx, op, false); err != nil {
		return opErr(op, NoSlot, err)
	}
	defer d.end()
	s := d.current()
	switch err := d.committable(s, id); {
	case err == errAlready:
		return nil
	case err != nil:
		return opErr(op, d.running, err)
	}
	d.start()
	d.emit(Event{Phase: PhaseStoring, Slot: d.running})
	err := opErr(op, d.running, d.store(ctx, s.committed()))
	d.finish(op, d.running, err)
	return err
}

// errAlready says that a commit has been carried out before.
var errAlready = errors.New("already committed")

// committable reports why trial id cannot be committed.
func (d *Device) committable(s BootState, id TrialID) error {
	named := id != TrialID{}
	switch {
	case s.Committed && named && s.Last.Trial == id:
		if s.Last.Outcome == OutcomeCommitted {
			return errAlready
		}
		return fmt.Errorf("%s: %w", s.Last.Reason, ErrReverted)
	case s.Committed && s.Active != d.running:
		return ErrReverted
	case s.Committed:
		return ErrCommitted
	case s.Active != d.running:
		return ErrRebootPending
	case named && id != s.Trial, !named && d.o.RequireTrialID:
		return ErrWrongTrial
	}
	if !s.Booted || s.CommitTimeout == 0 {
		return nil
	}
	left, err := d.remaining(s)
	if err != nil {
		return err
	}
	if left <= 0 {
		return fmt.Errorf("%v after boot: %w", s.CommitTimeout, ErrExpired)
	}
	return nil
}

// Revert goes back from the firmware on trial to the revert slot, which is
// committed: the next boot starts it. A trial that has not begun is called off.
// ErrCommitted says that there is nothing to revert. Revert does not reboot.
func (d *Device) Revert(ctx context.Context) error {
	return d.revert(ctx, ReasonRequested, "", TrialID{})
}

// revert ends the trial id, or with the zero id whichever is under way.
func (d *Device) revert(ctx context.Context, why Reason, message string, id TrialID) error {
	const op = "revert"
	if err := d.begin(ctx, op, false); err != nil {
		return opErr(op, NoSlot, err)
	}
	defer d.end()
	s := d.current()
	switch {
	case s.Committed && s.Active != d.running:
		return opErr(op, s.Active, ErrReverted)
	case s.Committed, id != TrialID{} && id != s.Trial:
		return opErr(op, s.Active, ErrCommitted)
	case s.Revert == NoSlot:
		return opErr(op, s.Active, ErrNoRevert)
	}
	next := s.reverted(why, message, s.Active == d.running)
	if !s.Booted && s.Active == d.running && !s.lost() {
		// The firmware that already runs was put on trial: it stays.
		next = s.settled()
		next.Last = Result{Outcome: OutcomeReverted, Reason: why, Trial: s.Trial, Slot: s.Active}
	}
	d.start()
	d.emit(Event{Phase: PhaseStoring, Slot: s.Active})
	err := opErr(op, s.Active, d.store(ctx, next))
	d.finish(op, s.Active, err)
	return err
}

// onTrial reports whether the running firmware is on trial in state s.
func (d *Device) onTrial(s BootState) bool {
	return !s.Committed && (s.Booted || s.lost()) && s.Active == d.running
}

// remaining returns the time left to commit, on the boot clock.
func (d *Device) remaining(s BootState) (time.Duration, error) {
	clock := d.o.BootClock
	if clock == nil {
		clock = d.bootClock
	}
	up, err := clock()
	if err != nil {
		return 0, fmt.Errorf("boot clock: %w", err)
	}
	return s.CommitTimeout - up, nil
}

// bootClock is the default of Options.BootClock.
func (d *Device) bootClock() (time.Duration, error) {
	b, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return time.Since(d.opened), nil
	}
	// Two decimal numbers of seconds: up, idle; proc_uptime(5).
	first, _, _ := strings.Cut(string(b), " ")
	up, err := strconv.ParseFloat(first, 64)
	if err != nil || up < 0 || up > 1e9 {
		return 0, fmt.Errorf("/proc/uptime holds %s: %w", Quote(string(b)), ErrInvalid)
	}
	return time.Duration(up * float64(time.Second)), nil
}

const (
	// defaultCheckTimeout bounds a hook or check.
	defaultCheckTimeout = time.Minute
	// watchInterval bounds how long Watch relies on a timer that may stand
	// still while the device is suspended, and separates attempts to commit.
	watchInterval = 10 * time.Second
)

// Watch sees the trial of the running firmware through; it returns nil at once
// if there is none. It runs the hooks and checks of the options, and then
// commits if the commit timeout is 0 or Options.CommitWhenHealthy is set;
// otherwise it waits for a Commit. If a hook or check fails, or the commit
// timeout expires, it reverts and reboots.
//
// A commit that fails is tried again every ten seconds.
//
// It returns nil when the firmware has been committed, by whomever; an error
// that wraps ErrReverted once it has reverted and Reboot has returned; and the
// error of ctx, leaving the trial as it is, when ctx ends. The commit timeout
// counts from the boot of the device, so a restart of the process does not
// prolong it; hooks and checks run again then. A hook or check that does not
// return in time is abandoned.
func (d *Device) Watch(ctx context.Context) error {
	const op = "watch"
	d.mu.Lock()
	if d.watching {
		d.mu.Unlock()
		return opErr(op, NoSlot, ErrBusy)
	}
	d.watching = true
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.watching = false
		d.mu.Unlock()
	}()
	return opErr(op, d.running, d.watch(ctx))
}

func (d *Device) watch(ctx context.Context) error {
	s := d.current()
	if !d.onTrial(s) {
		return nil
	}
	g := d.guard(ctx)
	err := d.trial(ctx, s, g)
	g.release(ctx, err)
	return err
}

// trial sees the trial of s through, guarded by g.
func (d *Device) trial(ctx context.Context, s BootState, g *guard) error {
	why, err := d.examine(ctx, s, g)
	if err == nil {
		why = ReasonTimeout
		if err = d.await(ctx, s, g, s.CommitTimeout == 0 || d.o.CommitWhenHealthy); err == nil {
			return d.verdict(s.Trial)
		}
	}
	if cur := d.current(); cur.Committed || cur.Trial != s.Trial {
		return d.verdict(s.Trial) // also if ctx has ended since
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var rerr error
	for range 3 {
		g.feed(ctx)
		rerr = d.revert(ctx, why, err.Error(), s.Trial)
		switch {
		case errors.Is(rerr, ErrCommitted), errors.Is(rerr, ErrReverted): // somebody was faster
			return d.verdict(s.Trial)
		case errors.Is(rerr, ErrNoRevert):
			return errors.Join(err, rerr)
		}
		if rerr == nil {
			break
		}
		if cur := d.current(); cur.Committed || cur.Trial != s.Trial {
			return d.verdict(s.Trial) // and something else is already under way
		}
	}
	// Also if the revert could not be stored: the boot stage cannot store
	// either, then, and does not start what it cannot count.
	d.o.Logger.Warn("rebooting into the revert slot", "slot", s.Revert, "reason", why, "err", err)
	g.feed(ctx) // the last time: a reboot that hangs is ended
	return fmt.Errorf("%w: %w", ErrReverted, errors.Join(err, rerr, d.Reboot(ctx)))
}

// verdict returns nil unless trial id ended in a revert.
func (d *Device) verdict(id TrialID) error {
	if last := d.current().Last; last.Trial == id && last.Outcome == OutcomeReverted {
		return fmt.Errorf("%s: %w", last.Reason, ErrReverted)
	}
	return nil
}

// examine runs the hooks and checks. If one fails it says which, and why the
// firmware must go.
func (d *Device) examine(ctx context.Context, s BootState, g *guard) (Reason, error) {
	run := func(kind, name string, f func(context.Context) error) (Reason, error) {
		limit := d.o.CheckTimeout
		if limit <= 0 {
			limit = defaultCheckTimeout
		}
		why := ReasonHealth
		if s.CommitTimeout > 0 {
			left, err := d.remaining(s)
			if err != nil {
				return ReasonTimeout, err
			}
			if left < limit {
				why, limit = ReasonTimeout, left
			}
		}
		fctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- noPanic(fctx, f) }()
		var err error
		for waiting := true; waiting; {
			select {
			case err = <-done:
				waiting = false
			case <-fctx.Done():
				err = fctx.Err()
				waiting = false
			case <-g.due():
				g.feed(ctx)
			}
		}
		if err == nil {
			return ReasonNone, nil
		}
		if fctx.Err() == nil {
			why = ReasonHealth
		}
		return why, fmt.Errorf("%s %s: %w: %w", kind, Quote(name), ErrHealth, err)
	}
	for _, h := range d.o.Hooks {
		if s.lost() {
			break // which slot is the old one is not known
		}
		if why, err := run("hook", h.Name, func(ctx context.Context) error { return h.Run(ctx, d.running, s.Revert) }); err != nil {
			return why, err
		}
	}
	for _, c := range d.o.Checks {
		if why, err := run("check", c.Name, c.Run); err != nil {
			return why, err
		}
	}
	return ReasonNone, nil
}

// noPanic turns a panic of f into an error: it must not keep the device from
// going back.
func noPanic(ctx context.Context, f func(context.Context) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return f(ctx)
}

// await returns nil when the trial of s is over, and an error when its time is.
// With commit it ends the trial itself, and does not give up if that fails.
func (d *Device) await(ctx context.Context, s BootState, g *guard, commit bool) error {
	next := time.Now() // attempt to commit
	for {
		if commit && !time.Now().Before(next) {
			g.feed(ctx)
			next = time.Now().Add(watchInterval)
			err := d.commit(ctx, s.Trial)
			if err == nil {
				return nil
			}
			d.o.Logger.Error("the firmware could not commit itself", "err", err)
		}
		d.mu.Lock()
		changed, cur := d.changed, d.state
		d.mu.Unlock()
		if cur.Committed || cur.Trial != s.Trial {
			return nil
		}
		wait := watchInterval
		if s.CommitTimeout > 0 {
			left, err := d.remaining(s)
			if err != nil {
				return err
			}
			if left <= 0 {
				return fmt.Errorf("%v after boot: %w", s.CommitTimeout, ErrExpired)
			}
			wait = min(wait, left)
		}
		if commit {
			wait = min(wait, time.Until(next))
		}
		select {
		case <-changed:
		case <-time.After(wait):
		case <-g.due():
			g.feed(ctx)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
