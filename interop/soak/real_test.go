package soak_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
	"github.com/slotota/ota/interop/statemachine"
	"github.com/slotota/ota/rpcjson"
)

// The traffic of an hour, over each transport: somebody looks at the device every
// five seconds, and updates it once.
const pollsAnHour = 720

var (
	soakHours = flag.Float64("soak.hours", 0.1, "hours of traffic over each transport, as fast as it goes")
	soakReal  realTime
)

func init() {
	flag.Var(&soakReal, "soak.real", "go on for `duration` at least, 2m unless one is given")
}

// realTime is a duration with a default for -soak.real alone.
type realTime time.Duration

func (d *realTime) String() string   { return time.Duration(*d).String() }
func (d *realTime) IsBoolFlag() bool { return true }

func (d *realTime) Set(s string) error {
	if s == "true" {
		s = "2m"
	}
	v, err := time.ParseDuration(s)
	*d = realTime(v)
	return err
}

// served is a device that is reached in some ways.
type served struct {
	t    *testing.T
	d    *sim.Device
	ways []way
	stop func() // ends all that runs on the device
}

// boot switches the device off and on.
func (s *served) boot() error {
	s.off()
	s.d.Chip.PowerOff(memflash.LoseAll, 0)
	booted := time.Now()
	dev, _, err := s.d.Boot(context.Background(), &ota.Options{
		Platform: "sim", Product: "demo",
		BootClock: func() (time.Duration, error) { return time.Since(booted), nil },
		Reset:     func(context.Context) error { return nil }, // the test takes the power away
	})
	if err != nil {
		return err
	}
	policy := &bundle.Policy{AllowUnsigned: true}
	srv, err := rpcjson.New(dev, rpcjson.Options{ID: deviceID, NoAuth: true, Open: policy.Image})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() { _ = dev.Watch(ctx) })
	for i, w := range s.ways {
		all.Go(func() {
			if err := w.serve(ctx, srv); ctx.Err() == nil {
				s.t.Errorf("way %d: served no longer: %v", i, err)
			}
		})
	}
	s.stop = func() {
		cancel()
		all.Wait()
		srv.Close()
	}
	return nil
}

func (s *served) off() {
	if s.stop != nil {
		s.stop()
		s.stop = nil
	}
}

// answered repeats a call until the device, which has just been switched on,
// answers it.
func answered(ctx context.Context, call func(context.Context) error) error {
	for patience := 250 * time.Millisecond; ; patience = min(2*patience, 10*time.Second) {
		one, cancel := context.WithTimeout(ctx, patience)
		err := call(one)
		cancel()
		var re *rpcjson.Error
		if err == nil || errors.As(err, &re) || ctx.Err() != nil {
			return err
		}
	}
}

// update is one update by push and what becomes of it: n counts them.
func (s *served) update(ctx context.Context, c *rpcjson.Client, n int) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	i := statemachine.Image{Version: 2 + n%(sim.Versions-1)}
	if n%7 == 3 {
		i.Fault = statemachine.WrongDigest
	}
	zip, err := i.Bundle()
	if err != nil {
		return err
	}
	// It may have been switched on just now, at the end of another's update.
	if err := answered(ctx, func(ctx context.Context) error { _, err := c.Status(ctx); return err }); err != nil {
		return err
	}
	timeout := time.Duration(n%2) * time.Hour
	left, booted := n%5 != 1, n%11 != 5
	var bootErr error
	err = c.Push(ctx, bytes.NewReader(zip), int64(len(zip)), &rpcjson.PushOptions{
		ChunkSize: 700, CommitTimeout: &timeout,
		Progress: func(done, total int64) {
			switch {
			case !left && done > 2000 && done < total:
				// The client goes away in the middle of a call, and comes back.
				left = true
				gone, cancel := context.WithTimeout(ctx, 50*time.Microsecond)
				data := base64.StdEncoding.EncodeToString(zip[done:min(done+700, total)])
				_ = c.Call(gone, "OTA.Write", map[string]any{"offset": done, "data": data}, nil)
				cancel()
			case !booted && done > 3000:
				booted = true
				bootErr = s.boot() // the device loses its power
			}
		},
	})
	if bad := i.Fault != statemachine.Good; bootErr != nil || bad != (err != nil) {
		return fmt.Errorf("image %+v: push: %w", i, errors.Join(err, bootErr))
	}
	if err := s.boot(); err != nil {
		return err
	}
	method := "OTA.Commit"
	if n%6 == 2 {
		method = "OTA.Revert"
	}
	var re *rpcjson.Error // without a trial there is nothing to commit
	if err := answered(ctx, func(ctx context.Context) error { return c.Call(ctx, method, nil, nil) }); err != nil && !errors.As(err, &re) {
		return fmt.Errorf("%s: %w", method, err)
	}
	if err := s.boot(); err != nil {
		return err
	}
	var st ota.BootState
	if err := answered(ctx, func(ctx context.Context) (err error) { st, err = c.BootState(ctx); return err }); err != nil {
		return err
	}
	v := s.d.Identify(st.Active)
	if !st.Committed || v == 0 || method == "OTA.Commit" && i.Fault == statemachine.Good && v != i.Version {
		return fmt.Errorf("image %d in state %+v after %s of %+v", v, st, method, i)
	}
	return nil
}

// descriptors returns the number of open files, -1 if that cannot be known.
func descriptors() int {
	f, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return -1
	}
	return len(f)
}

// sample is the heap in use after some hours.
type sample struct{ hours, heap float64 }

// slope is the growth of the heap in bytes an hour, by least squares.
func slope(s []sample) float64 {
	var x, y, xx, xy float64
	for _, v := range s {
		x += v.hours
		y += v.heap
		xx += v.hours * v.hours
		xy += v.hours * v.heap
	}
	n := float64(len(s))
	if d := n*xx - x*x; d != 0 {
		return (n*xy - x*y) / d
	}
	return 0
}

// A device is looked at and updated over the network, over and over, in all the ways
// in which it can be reached: in each of them alone, and in all at once. It needs no
// more memory, goroutines and open files at the end than at the start.
func TestRealSoak(t *testing.T) {
	all := func(t *testing.T) (ws []way) {
		for _, w := range ways {
			ws = append(ws, w.open(t))
		}
		return ws
	}
	t.Run("all", func(t *testing.T) { soak(t, 0, all) })
	for i, w := range ways {
		t.Run(w.name, func(t *testing.T) { soak(t, i+1, func(t *testing.T) []way { return []way{w.open(t)} }) })
	}
}

func soak(t *testing.T, n int, open func(*testing.T) []way) {
	freeAddr(t, "tcp") // what the runtime needs once for all
	goroutines, fds := runtime.NumGoroutine(), descriptors()
	d, err := sim.New(sim.Geometries()[0])
	require.NoError(t, err)
	s := &served{t: t, d: d, ways: open(t)}
	require.NoError(t, s.boot())
	clients := make([]*rpcjson.Client, len(s.ways))
	dial := func(i int) {
		c, err := s.ways[i].dial()
		require.NoErrorf(t, err, "way %d", i)
		require.NoError(t, answered(t.Context(), func(ctx context.Context) error { _, err := c.Status(ctx); return err }))
		clients[i] = c
	}
	for i := range clients {
		dial(i)
	}

	var (
		start   = time.Now()
		atLeast = time.Duration(soakReal) / time.Duration(len(ways)+1)
		polls   = max(20, int(*soakHours*pollsAnHour))
		slowest time.Duration
		updates int
		heap    = make([]sample, 0, 1000) // its growth must not count
		sampled time.Time
		k       int
	)
	for ; k < polls || time.Since(start) < atLeast; k++ {
		var wg sync.WaitGroup
		errs := make([]error, len(clients))
		before := time.Now()
		for i, c := range clients {
			wg.Go(func() { _, errs[i] = c.Status(t.Context()) })
		}
		wg.Wait()
		require.NoErrorf(t, errors.Join(errs...), "poll %d", k)
		slowest = max(slowest, time.Since(before))
		if k%pollsAnHour == min(polls, pollsAnHour)-1 {
			// An hour is over.
			for i, c := range clients {
				require.NoErrorf(t, s.update(t.Context(), c, n), "way %d: update %d", i, n)
				n++
				updates++
			}
			for i, c := range clients { // connections come and go, too
				_ = c.Close() // says so if the device has ended the connection before
				dial(i)
			}
		}
		// Not so often that little else is done.
		if k >= polls/4 && time.Since(start) >= atLeast/4 && k%(max(polls, 16)/16) == 0 && time.Since(sampled) >= atLeast/100 {
			sampled = time.Now()
			_, h := settled(0)
			heap = append(heap, sample{float64(k) / pollsAnHour, float64(h)})
		}
	}
	took := time.Since(start)
	for _, c := range clients {
		_ = c.Close()
	}
	s.off()
	for _, w := range s.ways {
		w.close()
	}
	require.NoError(t, d.Chip.Err())
	require.Eventually(t, func() bool { return runtime.NumGoroutine() <= goroutines+1 }, 30*time.Second, 10*time.Millisecond, // one evaluates this
		"%d goroutines before", goroutines)
	require.Equal(t, fds, descriptors(), "open files")
	grown := heap[len(heap)-1].heap - heap[0].heap
	t.Logf("%.1f hours of traffic in %v: %d calls of OTA.Status (slowest %v), %d updates; heap %.0f KiB, grown by %.1f KiB, slope %.2f KiB an hour (%d samples); %d goroutines, %d open files before and after",
		float64(k)/pollsAnHour, took.Round(time.Millisecond), k*len(clients), slowest.Round(time.Microsecond), updates,
		heap[len(heap)-1].heap/1024, grown/1024, slope(heap)/1024, len(heap), goroutines, fds)
	require.Less(t, grown, float64(256<<10), "bytes that the heap has grown by")
}
