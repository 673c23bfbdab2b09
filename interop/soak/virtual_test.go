// Package soak_test lets devices live long lives: a fleet of simulated ones, over
// as many years as one likes, and one that is served on a real network for as
// long as one likes.
package soak_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
	"github.com/slotota/ota/interop/statemachine"
)

var (
	soakYears = flag.Int("soak.years", 200, "device-years of the soak in virtual time")
	soakSeed  = flag.Uint64("soak.seed", 0, "seed of the first device; 0 means a random one")
)

// lifetime is how many years each device lives.
const lifetime = 10

// geometries are those of the fleet. Files, the last of them, have no erase units to wear out.
func geometries() []sim.Geometry {
	all := sim.Geometries()
	three := all[4]
	three.Name, three.Slots = all[4].Name+"-three-slots", 3
	return []sim.Geometry{all[0], three, all[1]}
}

// life is a device and what befalls it.
type life struct {
	*statemachine.Machine
	rng *rand.Rand
}

// one reports true once in n times.
func (l *life) one(n int) bool { return l.rng.IntN(n) == 0 }

// month is an update, or something else of the kind, and what becomes of it.
func (l *life) month() error {
	if err := l.mischief(); err != nil {
		return err
	}
	timeout := []time.Duration{0, time.Minute, time.Hour}[l.rng.IntN(3)]
	s := l.State()
	i := statemachine.Image{Version: 2 + l.rng.IntN(sim.Versions-1), Security: s.Floor}
	if l.one(10) {
		i.Security++
	}
	if l.one(8) {
		i.Fault = statemachine.ImageFault(1 + l.rng.IntN(statemachine.ImageFaults-1))
	}
	if l.one(20) && i.Security > 0 {
		i.Security-- // too old
	}
	if l.one(15) {
		if err := l.Snapshot(l.one(2), timeout); err != nil {
			return err
		}
	}
	if l.one(15) {
		other := ota.SlotID(l.rng.IntN(l.Env().Slots))
		if err := l.SetBootState(ota.BootStatePatch{Active: &other, CommitTimeout: &timeout}); err != nil {
			return err
		}
	}
	var err error
	if l.one(4) {
		err = l.Push(i, timeout, 500+l.rng.IntN(4000))
	} else {
		err = l.Update(i, timeout, l.one(5))
	}
	if err == nil {
		err = l.reboot()
	}
	if err == nil {
		err = l.verdict()
	}
	if err == nil {
		err = l.reboot()
	}
	return err
}

// verdict is what becomes of a trial.
func (l *life) verdict() error {
	s := l.State()
	switch l.rng.IntN(20) {
	case 0, 1:
		return l.Revert()
	case 2, 3:
		l.Wait(2 * time.Hour)
		if err := l.Commit(0); err != nil { // too late, perhaps
			return err
		}
		return l.Watch()
	case 4, 5:
		return nil // reset before the commit
	case 6, 7, 8:
		if s.Expired(l.Env()) {
			return l.Watch() // commits itself
		}
	}
	l.Wait(time.Duration(l.rng.IntN(50)) * time.Second)
	return l.Commit(s.Trial)
}

func (l *life) reboot() error {
	return l.Reboot(l.one(3), memflash.Loss(l.rng.IntN(3)), l.rng.Uint64())
}

// mischief plans or does something bad, of what a device stands.
func (l *life) mischief() error {
	if l.one(3) {
		l.Cut(l.rng.IntN(70), l.rng.IntN(len(memflash.TearModes(0))), l.rng.Uint64())
	}
	if l.one(12) {
		l.Fault(l.rng.IntN(70), l.one(2), l.rng.Uint64())
	}
	if l.one(8) {
		how := statemachine.Damage(l.rng.IntN(statemachine.Damages))
		if _, err := l.HarmRecord(l.rng.IntN(3), how, l.rng.Int64(), uint(l.rng.IntN(8))); err != nil {
			return err
		}
	}
	if l.one(24) {
		// The running firmware decays while there is another one to fall back to.
		s := l.State()
		other := slices.IndexFunc(s.Slots[:], func(f statemachine.Firmware) bool {
			return f.Approved && !f.Rejected && f.Security >= s.Floor && f != s.Slots[s.Running]
		})
		if other < 0 || !s.Committed || s.Active != s.Running || !l.Env().Holds(ota.SlotID(other), s.Slots[other].Version) {
			return nil
		}
		if _, err := l.HarmSlot(s.Running, l.rng.Int64(), uint(l.rng.IntN(8))); err != nil {
			return err
		}
		return l.Reboot(true, 0, 0)
	}
	return nil
}

// wear is how unevenly the erase units of a record are worn: the most worn one
// in relation to the mean.
func wear(units []int) float64 {
	sum := 0
	for _, n := range units {
		sum += n
	}
	if sum == 0 {
		return 0
	}
	return float64(slices.Max(units)) * float64(len(units)) / float64(sum)
}

// live is the life of the device of that seed.
func live(seed uint64, years int) (statemachine.Stats, float64, error) {
	l := &life{rng: rand.New(rand.NewPCG(seed, 0))}
	var err error
	gs := geometries()
	l.Machine, err = statemachine.New(statemachine.Config{
		Geometry: gs[seed%uint64(len(gs))],
		Tries:    1 + l.rng.IntN(2),
	})
	if err != nil {
		return statemachine.Stats{}, 0, err
	}
	defer l.Close()
	for m := range 12 * years {
		if err := l.month(); err != nil {
			return l.Stats(), 0, fmt.Errorf("month %d: %w", m, err)
		}
	}
	if err := l.Settle(); err != nil {
		return l.Stats(), 0, err
	}
	if n := l.Stats().Repairs; n > 0 {
		return l.Stats(), 0, fmt.Errorf("nothing could be booted any more, %d times", n)
	}
	return l.Stats(), wear(l.Wear()), l.Close()
}

// settled returns the number of goroutines and the bytes in use once both have
// come to rest.
func settled(limit int) (goroutines int, heap uint64) {
	for range 100 {
		if runtime.NumGoroutine() <= limit {
			break
		}
		runtime.Gosched()
	}
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return runtime.NumGoroutine(), m.HeapAlloc
}

// A fleet of devices gets an update a month, good or bad, among power cuts and
// damage. None is ever lost, does anything else than the model, or wears out one
// copy of its record before the others.
func TestVirtualSoak(t *testing.T) {
	seed := *soakSeed
	if seed == 0 {
		seed = rand.Uint64N(1 << 40)
	}
	devices := max(1, *soakYears/lifetime)
	// What is made once must not count.
	_, _, err := live(seed, 1)
	require.NoErrorf(t, err, "-soak.seed=%d", seed)
	goroutines, heap := settled(0)

	var (
		mu    sync.Mutex
		total statemachine.Stats
		worst float64
		next  = 0
		errs  []error
		wg    sync.WaitGroup
	)
	start := time.Now()
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				stop := i >= devices || len(errs) > 0
				mu.Unlock()
				if stop {
					return
				}
				stats, w, err := live(seed+uint64(i), lifetime)
				mu.Lock()
				total.Add(stats)
				worst = max(worst, w)
				if err != nil {
					errs = append(errs, fmt.Errorf("-soak.seed=%d: %w", seed+uint64(i), err))
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	require.Empty(t, errs)
	require.GreaterOrEqual(t, total.Updates, 12*lifetime*devices)
	require.Positive(t, total.Cuts)
	require.LessOrEqual(t, worst, 1.2, "wear of the most worn copy of a record, relative to the mean")

	g, h := settled(goroutines)
	require.LessOrEqual(t, g, goroutines, "goroutines")
	require.Less(t, h, heap+1<<20, "bytes of heap")
	years := devices * lifetime
	t.Logf("%d device-years from seed %d in %v (%.0f per second): %+v; wear at most %.3f of the mean; heap %+d KiB, goroutines %+d",
		years, seed, took.Round(time.Millisecond), float64(years)/took.Seconds(), total, worst, (int64(h)-int64(heap))/1024, g-goroutines)
}
