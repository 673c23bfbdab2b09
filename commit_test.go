package ota_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
	"github.com/stretchr/testify/require"
)

// onTrial returns a device that has just booted version 2 on trial, in virtual
// time, with a boot clock and a counter of resets.
func onTrial(t *testing.T, timeout time.Duration, o ota.Options) (*rig, *int) {
	resets := new(int)
	o.Reset = func(context.Context) error { *resets++; return nil }
	r := newRig(t, fileGeometry(), o)
	r.update(2, timeout)
	booted := time.Now()
	r.o.BootClock = func() (time.Duration, error) { return time.Since(booted), nil }
	r.boot()
	require.Equal(t, ota.SlotID(1), r.h.Slot)
	return r, resets
}

// Commit and the timer meet: exactly one wins, and the stored state says which.
func TestCommitAgainstTimer(t *testing.T) {
	const timeout = 10 * time.Second
	for _, tc := range []struct {
		name  string
		after time.Duration
		wins  bool
	}{
		{"T-1ns", timeout - 1, true},
		{"T", timeout, false},
		{"T+1ns", timeout + 1, false},
	} {
		for _, watchFirst := range []bool{true, false} {
			t.Run(tc.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r, resets := onTrial(t, timeout, ota.Options{})
					watched, committed := make(chan error, 1), make(chan error, 1)
					watch := func() { watched <- r.dev.Watch(context.Background()) }
					commit := func() {
						<-time.After(tc.after)
						committed <- r.dev.Commit(context.Background())
					}
					if watchFirst {
						go watch()
						synctest.Wait()
						go commit()
					} else {
						go commit()
						synctest.Wait()
						go watch()
					}
					werr, cerr := <-watched, <-committed
					if tc.wins {
						require.NoError(t, cerr)
						require.NoError(t, werr)
						require.Zero(t, *resets)
					} else {
						require.True(t, errors.Is(cerr, ota.ErrExpired) || errors.Is(cerr, ota.ErrReverted), "%v", cerr)
						require.ErrorIs(t, werr, ota.ErrReverted)
						require.Equal(t, 1, *resets)
					}
					s := r.stored()
					require.True(t, s.Committed)
					require.Equal(t, tc.wins, s.Active == 1)
					require.Equal(t, tc.wins, s.Last.Outcome == ota.OutcomeCommitted)
					r.boot()
					require.Equal(t, tc.wins, r.Identify(r.h.Slot) == 2)
					if !tc.wins {
						require.Equal(t, ota.ReasonTimeout, r.state().Last.Reason)
					}
				})
			})
		}
	}
}

// The deadline counts from the boot, whenever the daemon starts, and however
// often.
func TestDeadlineCountsFromBoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := onTrial(t, time.Minute, ota.Options{})
		for range 5 {
			<-time.After(10 * time.Second)
			dev, err := ota.Open(t.Context(), r.Record, r.Slots, &r.o)
			require.NoError(t, err)
			r.dev = dev
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			require.ErrorIs(t, dev.Watch(ctx), context.DeadlineExceeded)
			cancel()
			require.False(t, r.stored().Committed, "an end of the daemon decides nothing")
		}
		require.Equal(t, 5*time.Second, r.dev.Status().Remaining)
		start := time.Now()
		require.ErrorIs(t, r.dev.Watch(t.Context()), ota.ErrReverted)
		require.Equal(t, 5*time.Second, time.Since(start))
	})
}

// A timer that stood still in suspend does not prolong the trial.
func TestDeadlineAfterSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := onTrial(t, time.Hour, ota.Options{})
		booted := time.Now()
		var suspended atomic.Int64
		r.o.BootClock = func() (time.Duration, error) { return time.Since(booted) + time.Duration(suspended.Load()), nil }
		dev, err := ota.Open(t.Context(), r.Record, r.Slots, &r.o)
		require.NoError(t, err)
		done := make(chan error)
		go func() { done <- dev.Watch(context.Background()) }()
		synctest.Wait()
		suspended.Store(int64(2 * time.Hour))
		require.ErrorIs(t, <-done, ota.ErrReverted)
		require.LessOrEqual(t, time.Since(booted), 10*time.Second)
	})
}

func TestWatchCommitsItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var order []string
		o := ota.Options{
			Hooks: []ota.Hook{{Name: "merge", Run: func(_ context.Context, newSlot, oldSlot ota.SlotID) error {
				require.Equal(t, [2]ota.SlotID{1, 0}, [2]ota.SlotID{newSlot, oldSlot})
				order = append(order, "hook")
				return nil
			}}},
			Checks: []ota.Check{{Name: "net", Run: func(context.Context) error {
				order = append(order, "check")
				return nil
			}}},
		}
		r, resets := onTrial(t, 0, o)
		require.NoError(t, r.dev.Watch(t.Context()))
		require.Equal(t, []string{"hook", "check"}, order)
		require.True(t, r.stored().Committed)
		require.Zero(t, *resets)
		require.NoError(t, r.dev.Watch(t.Context()), "nothing to watch")
		require.Len(t, order, 2)
	})
}

func TestCommitWhenHealthy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := onTrial(t, time.Hour, ota.Options{CommitWhenHealthy: true})
		start := time.Now()
		require.NoError(t, r.dev.Watch(t.Context()))
		require.Zero(t, time.Since(start))
		require.True(t, r.stored().Committed)
	})
}

func TestFailingChecksRevert(t *testing.T) {
	bad := errors.New("no network")
	for name, tc := range map[string]struct {
		timeout time.Duration
		run     func(context.Context) error
		why     ota.Reason
		message string
		after   time.Duration
	}{
		"error":           {0, func(context.Context) error { return bad }, ota.ReasonHealth, "no network", 0},
		"error, timeout":  {time.Hour, func(context.Context) error { return bad }, ota.ReasonHealth, "no network", 0},
		"panic":           {0, func(context.Context) error { panic("oops") }, ota.ReasonHealth, "oops", 0},
		"hang":            {0, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, ota.ReasonHealth, "deadline", 30 * time.Second},
		"hang, timeout":   {20 * time.Second, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, ota.ReasonTimeout, "deadline", 20 * time.Second},
		"deaf":            {0, func(context.Context) error { <-time.After(time.Hour); return nil }, ota.ReasonHealth, "deadline", 30 * time.Second},
		"late and hollow": {10 * time.Second, func(context.Context) error { <-time.After(time.Minute); return nil }, ota.ReasonTimeout, "deadline", 10 * time.Second},
	} {
		for _, hook := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					o := ota.Options{CheckTimeout: 30 * time.Second, Checks: []ota.Check{{Name: "net", Run: tc.run}}}
					if hook {
						o.Checks, o.Hooks = nil, []ota.Hook{{Name: "net", Run: func(ctx context.Context, _, _ ota.SlotID) error { return tc.run(ctx) }}}
					}
					r, resets := onTrial(t, tc.timeout, o)
					start := time.Now()
					err := r.dev.Watch(t.Context())
					require.ErrorIs(t, err, ota.ErrReverted)
					require.ErrorIs(t, err, ota.ErrHealth)
					require.Equal(t, tc.after, time.Since(start))
					require.Equal(t, 1, *resets)
					r.boot()
					require.Equal(t, 1, r.Identify(r.h.Slot))
					last := r.dev.Status().State.Last
					require.Equal(t, tc.why, last.Reason)
					require.Contains(t, last.Message, `"net"`)
					require.Contains(t, last.Message, tc.message)
					<-time.After(2 * time.Hour) // until the deaf have returned
				})
			})
		}
	}
}

// A boot clock that fails must not keep a trial alive.
func TestBootClockFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("no clock")
		r, resets := onTrial(t, time.Minute, ota.Options{})
		r.o.BootClock = func() (time.Duration, error) { return 0, broken }
		dev, err := ota.Open(t.Context(), r.Record, r.Slots, &r.o)
		require.NoError(t, err)
		require.ErrorIs(t, dev.Commit(t.Context()), broken)
		err = dev.Watch(t.Context())
		require.ErrorIs(t, err, ota.ErrReverted)
		require.ErrorIs(t, err, broken)
		require.Equal(t, 1, *resets)
		require.Equal(t, ota.SlotID(0), r.stored().Active)
	})
}

// Watch reboots even if the revert cannot be stored: the trial has no boot left.
func TestWatchRebootsWithoutRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, resets := onTrial(t, time.Second, ota.Options{})
		c := r.Chip.Clone()
		r.Chip.PowerOff(0, 0)
		require.ErrorIs(t, r.dev.Watch(t.Context()), ota.ErrReverted)
		require.Equal(t, 1, *resets)
		_, err := r.dev.BootState(t.Context())
		require.ErrorIs(t, err, ota.ErrStateUnknown)
		require.True(t, r.Chip.Equal(c))
		r.boot()
		require.Equal(t, 1, r.Identify(r.h.Slot))
	})
}

func TestWatchTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := onTrial(t, time.Minute, ota.Options{})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.dev.Watch(ctx) }()
		synctest.Wait()
		require.ErrorIs(t, r.dev.Watch(ctx), ota.ErrBusy)
		require.NoError(t, r.dev.Revert(t.Context()))
		require.ErrorIs(t, <-done, ota.ErrReverted, "somebody else reverted")
		cancel()
	})
}

// Without Reset the caller has to reboot.
func TestRebootUnsupported(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	require.ErrorIs(t, r.dev.Reboot(t.Context()), ota.ErrUnsupported)
}

// The default boot clock does not run backwards, and runs.
func TestDefaultBootClock(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.update(2, ota.MaxCommitTimeout)
	r.boot()
	left := r.dev.Status().Remaining
	require.Positive(t, left)
	require.LessOrEqual(t, left, time.Duration(ota.MaxCommitTimeout))
	require.NoError(t, r.dev.Commit(t.Context()))
}

// An operation that is about to be refused does not keep Watch from its work.
func TestWatchBesideRefusedUpdate(t *testing.T) {
	for _, timeout := range []time.Duration{0, time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			r, resets := onTrial(t, timeout, ota.Options{Tries: 2})
			checking, proceed := make(chan struct{}), make(chan struct{})
			r.o.OnEvent = func(e ota.Event) {
				if e.Op == "update" && e.Phase == ota.PhaseChecking {
					close(checking)
					<-proceed
				}
			}
			var err error
			r.dev, err = ota.Open(t.Context(), r.Record, r.Slots, &r.o)
			require.NoError(t, err)
			<-time.After(timeout)
			updated, watched := make(chan error, 1), make(chan error, 1)
			go func() {
				_, err := r.dev.Update(context.Background(), &sim.Image{V: 3}, nil)
				updated <- err
			}()
			<-checking
			go func() { watched <- r.dev.Watch(context.Background()) }()
			synctest.Wait()
			close(proceed)
			require.ErrorIs(t, <-updated, ota.ErrNotCommitted)
			werr := <-watched
			s := r.stored()
			require.True(t, s.Committed)
			if timeout == 0 {
				require.NoError(t, werr)
				require.Equal(t, ota.SlotID(1), s.Active)
			} else {
				require.ErrorIs(t, werr, ota.ErrReverted)
				require.Equal(t, ota.SlotID(0), s.Active)
				require.Equal(t, 1, *resets)
			}
		})
	}
}

// A commit that cannot be stored is tried again.
func TestWatchCommitsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, resets := onTrial(t, 0, ota.Options{})
		r.Chip.Plan(memflash.Fault{Kind: memflash.Fail, Forever: true})
		done := make(chan error)
		go func() { done <- r.dev.Watch(context.Background()) }()
		<-time.After(time.Minute)
		r.Chip.Plan()
		require.NoError(t, <-done)
		require.True(t, r.stored().Committed)
		require.Zero(t, *resets)
	})
}

// A trial of the running firmware that has not begun can be called off, and
// committed, whatever the clock says.
func TestTrialOfTheRunning(t *testing.T) {
	late := func() (time.Duration, error) { return time.Hour, nil }
	r := newRig(t, fileGeometry(), ota.Options{BootClock: late})
	r.install(2)
	again := &ota.SnapshotOptions{SetAsRevert: true, CommitTimeout: time.Minute}
	_, err := r.dev.CreateSnapshot(t.Context(), again)
	require.NoError(t, err)
	require.NoError(t, r.dev.Revert(t.Context()))
	s := r.stored()
	require.Equal(t, ota.SlotID(1), s.Active)
	require.True(t, s.Committed)
	require.False(t, s.Slot(1).Rejected)
	require.Equal(t, ota.ReasonRequested, s.Last.Reason)

	_, err = r.dev.CreateSnapshot(t.Context(), again)
	require.NoError(t, err)
	require.NoError(t, r.dev.Commit(t.Context()))
	require.True(t, r.stored().Committed)
}

// Hooks are for the first boot of a new firmware, not for a loss.
func TestNoHookAfterLoss(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{Hooks: []ota.Hook{{Name: "merge", Run: func(context.Context, ota.SlotID, ota.SlotID) error {
		return errors.New("must not run")
	}}}})
	r.install(2)
	loseRecord(r)
	r.boot()
	require.NoError(t, r.dev.Watch(t.Context()))
}

// A commit that comes too late is refused, also if nobody watches.
func TestLateCommitWithoutWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := onTrial(t, time.Minute, ota.Options{})
		<-time.After(time.Minute)
		require.ErrorIs(t, r.dev.Commit(t.Context()), ota.ErrExpired)
		require.False(t, r.stored().Committed)
	})
}

// A committed firmware is not reverted, also if there were a slot to go back to.
func TestRevertOfCommitted(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	slot, err := r.dev.CreateSnapshot(t.Context(), nil)
	require.NoError(t, err)
	require.NoError(t, r.dev.SetBootState(t.Context(), ota.BootStatePatch{Revert: &slot}))
	require.ErrorIs(t, r.dev.Revert(t.Context()), ota.ErrCommitted)
	require.Equal(t, ota.SlotID(1), r.stored().Active)
}
