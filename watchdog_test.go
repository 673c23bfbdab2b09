package ota_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/stretchr/testify/require"
)

// dog is a watchdog in virtual time.
type dog struct {
	timeout time.Duration

	mu       sync.Mutex
	armed    bool
	due      time.Time
	bitten   time.Time // when it would have reset the device first
	fed      int
	disarmed int
	closed   int
	failFeed error
}

// look notes whether it has bitten by now.
func (w *dog) look() {
	if now := time.Now(); w.armed && w.bitten.IsZero() && !now.Before(w.due) {
		w.bitten = w.due
	}
}

func (w *dog) open(context.Context) (ota.Watchdog, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.look()
	w.armed, w.due = true, time.Now().Add(w.timeout)
	return w, nil
}

func (w *dog) Timeout() time.Duration { return w.timeout }

func (w *dog) Keepalive(context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.look()
	w.fed++
	w.due = time.Now().Add(w.timeout)
	return w.failFeed
}

func (w *dog) Disarm(context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.look()
	w.armed = false
	w.disarmed++
	return nil
}

func (w *dog) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed++
	return nil
}

// bite returns how long after now the device is reset, or 0 if never.
func (w *dog) bite() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.look()
	switch {
	case !w.bitten.IsZero():
		return -1
	case !w.armed:
		return 0
	}
	return time.Until(w.due)
}

// The watchdog is fed through checks and the wait for the commit, and ends with it.
func TestWatchdogCommit(t *testing.T) {
	for _, healthy := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			w := &dog{timeout: 8 * time.Second}
			r, resets := onTrial(t, time.Hour, ota.Options{
				Watchdog: w.open, CommitWhenHealthy: healthy,
				Checks: []ota.Check{{Name: "slow", Run: func(ctx context.Context) error { <-time.After(50 * time.Second); return nil }}},
			})
			require.False(t, w.armed, "started without a trial to watch")
			watched, start := make(chan error, 1), time.Now()
			go func() { watched <- r.dev.Watch(t.Context()) }()
			<-time.After(45 * time.Second)
			require.Positive(t, w.bite())
			if !healthy {
				<-time.After(30 * time.Minute)
				require.Positive(t, w.bite())
				require.NoError(t, r.dev.Commit(t.Context()))
			}
			require.NoError(t, <-watched)
			require.Zero(t, w.bite())
			require.Equal(t, 1, w.disarmed)
			require.Equal(t, 1, w.closed)
			require.Zero(t, *resets)
			// Not more often than need be.
			require.LessOrEqual(t, w.fed, int(time.Since(start)/(2*time.Second))+8)

			require.NoError(t, r.dev.Watch(t.Context()), "without a trial")
			require.False(t, w.armed)
		})
	}
}

// After a revert it stays armed: a reboot that hangs is ended.
func TestWatchdogRevert(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &dog{timeout: 8 * time.Second}
		r, resets := onTrial(t, time.Minute, ota.Options{Watchdog: w.open})
		require.ErrorIs(t, r.dev.Watch(t.Context()), ota.ErrReverted)
		require.Equal(t, 1, *resets)
		require.Equal(t, 8*time.Second, w.bite())
		require.Zero(t, w.disarmed)
		require.Equal(t, 1, w.closed)
	})
}

// When the process is told to end, the next one has the timeout to take over.
func TestWatchdogRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &dog{timeout: 8 * time.Second}
		r, _ := onTrial(t, time.Hour, ota.Options{Watchdog: w.open})
		ctx, cancel := context.WithTimeout(t.Context(), 21*time.Second)
		defer cancel()
		require.ErrorIs(t, r.dev.Watch(ctx), context.DeadlineExceeded)
		require.Equal(t, 8*time.Second, w.bite())
		require.Zero(t, w.disarmed)
		require.Equal(t, 1, w.closed)
		<-time.After(7 * time.Second)
		go func() { _ = r.dev.Commit(<-after(20 * time.Second)) }()
		require.NoError(t, r.dev.Watch(t.Context()))
		require.Zero(t, w.bite())
	})
}

// A program that commits and then ends leaves no armed watchdog behind, whichever of
// the two Watch sees first.
func TestWatchdogCommitThenEnd(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			w := &dog{timeout: 8 * time.Second}
			r, _ := onTrial(t, time.Hour, ota.Options{Watchdog: w.open})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			watched := make(chan error, 1)
			go func() { watched <- r.dev.Watch(ctx) }()
			synctest.Wait()
			require.NoError(t, r.dev.Commit(ctx))
			cancel()
			require.NoError(t, <-watched)
			require.Zero(t, w.bite())
			require.Equal(t, 1, w.disarmed)
			require.Equal(t, 1, w.closed)
		})
	}
}

// after returns a context when the time has come.
func after(d time.Duration) <-chan context.Context {
	c := make(chan context.Context, 1)
	time.AfterFunc(d, func() { c <- context.Background() })
	return c
}

// A store that never returns is ended by the watchdog.
func TestWatchdogHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &dog{timeout: 8 * time.Second}
		r, _ := onTrial(t, 0, ota.Options{Watchdog: w.open})
		release := make(chan struct{})
		r.Chip.OnOp(func(op memflash.Op) {
			if op.Kind == memflash.OpWrite {
				<-release
			}
		})
		watched := make(chan error, 1)
		go func() { watched <- r.dev.Watch(t.Context()) }()
		<-time.After(time.Minute)
		require.Negative(t, w.bite())
		require.Equal(t, 1, w.fed-1, "fed when opened, and before the store")
		close(release)
		require.NoError(t, <-watched)
	})
}

// The trial goes on without a watchdog that cannot be had, or not be fed.
func TestWatchdogFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, resets := onTrial(t, 0, ota.Options{Watchdog: func(context.Context) (ota.Watchdog, error) { return nil, errors.New("busy") }})
		require.NoError(t, r.dev.Watch(t.Context()))
		require.True(t, r.stored().Committed)
		require.Zero(t, *resets)
		w := &dog{timeout: time.Second, failFeed: errors.New("no")}
		r, _ = onTrial(t, 0, ota.Options{Watchdog: w.open})
		require.NoError(t, r.dev.Watch(t.Context()))
		require.Equal(t, 1, w.disarmed)
	})
}

// While commits fail the watchdog is fed, and the commit is tried again every ten
// seconds as before.
func TestWatchdogCommitFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &dog{timeout: 28 * time.Second}
		r, _ := onTrial(t, 0, ota.Options{Watchdog: w.open})
		start := time.Now()
		var tries []time.Duration
		r.Chip.OnOp(func(op memflash.Op) {
			if op.Kind != memflash.OpWrite {
				return
			}
			if since := time.Since(start); len(tries) == 0 || since != tries[len(tries)-1] {
				tries = append(tries, since)
			}
		})
		r.Chip.Plan(memflash.Fault{At: r.Chip.Ops(), On: memflash.OpWrite, Kind: memflash.Fail, Forever: true})
		time.AfterFunc(25*time.Second, func() { r.Chip.Plan() })
		require.NoError(t, r.dev.Watch(t.Context()))
		require.Equal(t, []time.Duration{0, 10 * time.Second, 20 * time.Second, 30 * time.Second}, tries)
		require.Zero(t, w.bite())
	})
}
