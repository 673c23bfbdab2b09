package crashtest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/stretchr/testify/require"
)

// put stores a number in one copy, get returns it or 0.
func put(f ota.Flash, n uint32) error {
	var b [8]byte
	binary.LittleEndian.PutUint32(b[:], n)
	binary.LittleEndian.PutUint32(b[4:], ^crc32.ChecksumIEEE(b[:4]))
	if err := f.(ota.Eraser).Erase(0, f.Size()); err != nil {
		return err
	}
	if _, err := f.WriteAt(b[:], 0); err != nil {
		return err
	}
	return f.Sync()
}

func get(f ota.Flash) (uint32, error) {
	var b [8]byte
	if _, err := f.ReadAt(b[:], 0); err != nil {
		return 0, err
	}
	n := binary.LittleEndian.Uint32(b[:])
	if binary.LittleEndian.Uint32(b[4:]) != ^crc32.ChecksumIEEE(b[:4]) {
		n = 0
	}
	return n, nil
}

// store keeps number 1 in copies, replaces it by 2, and expects either. heal
// rewrites copies that were lost.
func store(copies int, heal bool) Scenario {
	cfgs := make([]memflash.Config, copies)
	for i := range cfgs {
		cfgs[i] = memflash.Config{Size: 64, EraseSize: 64, WriteSize: 8}
	}
	base := memflash.NewChip(cfgs...)
	for _, f := range base.Flashes() {
		if err := put(f, 1); err != nil {
			panic(err)
		}
	}
	return Scenario{Name: "toy/store", New: func(context.Context) (*Device, error) {
		chip := base.Clone()
		fs := chip.Flashes()
		return &Device{
			Chip: chip,
			Run: func(context.Context) error {
				for _, f := range fs {
					if err := put(f, 2); err != nil {
						return err
					}
				}
				return nil
			},
			Check: func(context.Context) error {
				var found uint32
				for _, f := range fs {
					n, err := get(f)
					if err != nil {
						return err
					}
					found = max(found, n)
				}
				if found == 0 {
					return fmt.Errorf("nothing left: %w", ErrViolation)
				}
				for _, f := range fs {
					if n, err := get(f); err != nil {
						return err
					} else if n != found && heal {
						if err := put(f, found); err != nil {
							return err
						}
					}
				}
				return nil
			},
		}, nil
	}}
}

func cut(seed uint64) []memflash.Fault {
	return []memflash.Fault{{Kind: memflash.CutBits, Seed: seed}}
}

func requireFailure(t *testing.T, err error, replay string) *Failure {
	t.Helper()
	var f *Failure
	require.ErrorAs(t, err, &f)
	require.Equal(t, replay, FormatReplay(f.Scenario, f.Faults))
	require.Contains(t, err.Error(), fmt.Sprintf("replay %q", replay))
	require.NotContains(t, strings.Split(err.Error(), "\n")[0], "goroutine")
	return f
}

func TestExplore(t *testing.T) {
	// Two copies survive any one cut, and any two: a cut while one is written
	// leaves the other.
	r, err := Explore(t.Context(), store(2, true), nil)
	require.NoError(t, err)
	require.Equal(t, Report{Ops: 6, Reads: 0, Runs: []int{1, 6 * 8}}, r)
	require.Equal(t, 48, r.Total())
	require.Equal(t, "6 operations, 0 reads, 48 singles", r.String())

	for workers := 1; workers < 4; workers++ {
		r, err = Explore(t.Context(), store(2, true), &Options{Faults: []Modes{cut, cut, cut}, Workers: workers})
		require.NoError(t, err)
		// After each cut but that of the last sync there is a copy to heal, in
		// 3 operations, in which the second cut strikes. If that was not at the
		// sync, there are 3 operations again for the third.
		require.Equal(t, []int{1, 6, 5 * 3, 5 * 2 * 3}, r.Runs)
	}

	r, err = Explore(t.Context(), store(2, true), &Options{Seeds: 3, Faults: []Modes{cut}})
	require.NoError(t, err)
	require.Equal(t, 18, r.Total())
}

// One copy is lost by the first cut, and the harness says so.
func TestFindsTheSmallest(t *testing.T) {
	for range 10 {
		r, err := Explore(t.Context(), store(1, false), &Options{Workers: 4})
		f := requireFailure(t, err, "toy/store/0:prefix:1")
		require.ErrorIs(t, err, ErrViolation)
		require.Equal(t, 3, r.Ops)

		require.NoError(t, store(1, false).Replay(t.Context()))
		err = store(1, false).Replay(t.Context(), f.Faults...)
		requireFailure(t, err, "toy/store/0:prefix:1")
	}

	// Without healing it takes two that do not end the run, one for each copy.
	skips := func(seed uint64) []memflash.Fault {
		return []memflash.Fault{{Kind: memflash.Skip, On: memflash.OpWrite, Seed: seed}}
	}
	_, err := Explore(t.Context(), store(2, false), &Options{Faults: []Modes{skips}})
	require.NoError(t, err)
	_, err = Explore(t.Context(), store(2, false), &Options{Faults: []Modes{skips, skips}, Workers: 3})
	requireFailure(t, err, "toy/store/0:skip+on=write:1,1:skip+on=write:1")
}

// scenario has functions run on one plain flash.
func scenario(run, check func(context.Context, ota.Flash) error) Scenario {
	return Scenario{Name: "s", New: func(context.Context) (*Device, error) {
		chip := memflash.NewChip(memflash.Config{Size: 64})
		f := chip.Flashes()[0]
		if _, err := f.WriteAt([]byte("set up"), 0); err != nil { // operation 0 of the chip, not of the run
			return nil, err
		}
		d := &Device{Chip: chip}
		d.Run = func(ctx context.Context) error { return run(ctx, f) }
		d.Check = func(ctx context.Context) error { return check(ctx, f) }
		return d, nil
	}}
}

func fine(context.Context, ota.Flash) error { return nil }

func write(_ context.Context, f ota.Flash) error {
	_, err := f.WriteAt([]byte{1}, 0)
	return err
}

func TestFailures(t *testing.T) {
	var n atomic.Int32
	for name, tc := range map[string]struct {
		s      Scenario
		replay string
		text   string
	}{
		"cannot be set up": {Scenario{Name: "s", New: func(context.Context) (*Device, error) { return nil, errors.New("no chip") }},
			"s/none", "setting up: no chip"},
		"fails without a fault": {scenario(func(context.Context, ota.Flash) error { return errors.New("bad day") }, fine),
			"s/none", "bad day"},
		"fails the check without a fault": {scenario(write, func(context.Context, ota.Flash) error { return errors.New("not there") }),
			"s/none", "not there"},
		"is not the same twice": {scenario(func(ctx context.Context, f ota.Flash) error {
			for range n.Add(1) {
				if err := write(ctx, f); err != nil {
					return err
				}
			}
			return nil
		}, fine), "s/none", "differ"},
		"misuses flash": {scenario(func(_ context.Context, f ota.Flash) error {
			f.WriteAt([]byte{1}, 64)
			return nil
		}, fine), "s/none", "misuse of flash"},
		"panics": {scenario(func(ctx context.Context, f ota.Flash) error {
			if err := write(ctx, f); err != nil {
				panic("oh no")
			}
			return nil
		}, fine), "s/0:before:1", "panic: oh no"},
		"breaks a promise while it runs": {scenario(func(ctx context.Context, f ota.Flash) error {
			if err := write(ctx, f); err != nil {
				return fmt.Errorf("%w: %w", err, ErrViolation)
			}
			return nil
		}, fine), "s/0:before:1", "broken promise"},
		"cannot recover": {scenario(write, func(_ context.Context, f ota.Flash) error {
			b := make([]byte, 1)
			if _, err := f.ReadAt(b, 0); err != nil || b[0] != 1 {
				return errors.New("lost")
			}
			return nil
		}), "s/0:before:1", "lost"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Explore(t.Context(), tc.s, nil)
			requireFailure(t, err, tc.replay)
			require.ErrorContains(t, err, tc.text)
		})
	}
}

func TestHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// Without regard for its context.
		quit := make(chan bool)
		hang := scenario(func(ctx context.Context, f ota.Flash) error {
			err := write(ctx, f)
			if err != nil {
				<-quit
			}
			return err
		}, fine)
		_, err := Explore(t.Context(), hang, &Options{Timeout: time.Second})
		requireFailure(t, err, "s/0:before:1")
		require.ErrorContains(t, err, "still running after 1s")
		close(quit)

		// With regard for it.
		slow := scenario(func(ctx context.Context, f ota.Flash) error {
			if err := write(ctx, f); err != nil {
				<-ctx.Done()
				return err
			}
			return nil
		}, fine)
		_, err = Explore(t.Context(), slow, &Options{Timeout: time.Second})
		requireFailure(t, err, "s/0:before:1")
		require.ErrorContains(t, err, "took more than 1s")
	})
}

func TestContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var n atomic.Int32
	s := scenario(func(ctx context.Context, f ota.Flash) error {
		if n.Add(1) == 4 {
			cancel()
		}
		return write(ctx, f)
	}, fine)
	_, err := Explore(ctx, s, nil)
	require.ErrorIs(t, err, context.Canceled)
	require.Less(t, n.Load(), int32(8))
	require.ErrorIs(t, s.Replay(ctx, memflash.Fault{}), context.Canceled)
}

// A fault that is to last for ever lasts until the next reset, a later one stays
// planned.
func TestForever(t *testing.T) {
	s := scenario(func(ctx context.Context, f ota.Flash) error {
		for range 3 {
			if err := write(ctx, f); err == nil {
				return nil
			}
		}
		return errors.New("gave up")
	}, func(ctx context.Context, f ota.Flash) error {
		if err := write(ctx, f); err != nil {
			return err
		}
		return write(ctx, f)
	})
	fail := func(uint64) []memflash.Fault { return []memflash.Fault{{Kind: memflash.Fail, Forever: true}} }
	r, err := Explore(t.Context(), s, &Options{Faults: []Modes{fail}})
	require.NoError(t, err)
	require.Equal(t, []int{1, 1}, r.Runs)
	r, err = Explore(t.Context(), s, &Options{Faults: []Modes{fail, fail}})
	require.NoError(t, err)
	require.Equal(t, []int{1, 1, 4}, r.Runs, "at 1 and 2, for ever already, and at 3 and 4")
}

func TestReads(t *testing.T) {
	s := scenario(func(ctx context.Context, f ota.Flash) error {
		for range 3 {
			if _, err := f.ReadAt(make([]byte, 4), 0); err != nil {
				return err
			}
		}
		return write(ctx, f)
	}, fine)
	both := func(seed uint64) []memflash.Fault {
		return []memflash.Fault{{Kind: memflash.Fail, On: memflash.OpRead}, {Kind: memflash.CutBefore}}
	}
	r, err := Explore(t.Context(), s, &Options{Faults: []Modes{both}})
	require.NoError(t, err)
	require.Equal(t, Report{Ops: 1, Reads: 3, Runs: []int{1, 4}}, r)
}

func TestReplayText(t *testing.T) {
	for text, want := range map[string][]memflash.Fault{
		"a/b c+d/none":    nil,
		"x/0:before":      {{}},
		"x/7:bits+some:3": {{Kind: memflash.CutBits, At: 7, Loss: memflash.LoseSome, Seed: 3}},
		"x/1:prefix+n=5,2:weak+all:18446744073709551615": {
			{Kind: memflash.CutPrefix, At: 1, N: 5}, {Kind: memflash.CutWeak, At: 2, Loss: memflash.LoseAll, Seed: math.MaxUint64}},
		"/3:fail+on=write|sync+in=1.4096.16+forever": {{Kind: memflash.Fail, At: 3, On: memflash.OpWrite | memflash.OpSync,
			Flash: 1, Off: 4096, Len: 16, Forever: true}},
		"x/4:slow+on=read+delay=1.5s": {{Kind: memflash.Slow, At: 4, On: memflash.OpRead, Delay: 1500 * time.Millisecond}},
		"x/5:flip,6:skip,7:misdirect,8:after": {{Kind: memflash.Flip, At: 5}, {Kind: memflash.Skip, At: 6},
			{Kind: memflash.Misdirect, At: 7}, {Kind: memflash.CutAfter, At: 8}},
	} {
		name, got, err := ParseReplay(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
		require.Equal(t, text, FormatReplay(name, got))
	}
	for _, text := range []string{"", "x", "x/", "x/1", "x/1:", "x/:bits", "x/1:bit", "x/1:bits:", "x/1:bits:-1", "x/1:bits+", "x/1:bits+n=z",
		"x/1:bits+in=1.2", "x/1:bits+in=1.2.3.4", "x/1:bits+on=reed", "x/1:slow+delay=3", "x/1:bits,", "x/1:bits:1:2", "x/none,1:bits"} {
		_, _, err := ParseReplay(text)
		require.ErrorIs(t, err, ota.ErrInvalid, text)
	}
}

func TestRun(t *testing.T) {
	s := store(2, true)
	r := Run(t, []Scenario{s, {Name: "toy/again", New: s.New}}, nil)
	require.Equal(t, Report{Ops: 12, Runs: []int{2, 96}}, r)
	require.Zero(t, Run(t, []Scenario{s}, &Options{Replay: "toy/store/0:bits:1,4:bits:1"}))
}

func TestGeometries(t *testing.T) {
	for _, g := range Geometries() {
		for _, n := range []int64{0, 1, 4096, 5000, 1 << 20} {
			chip := memflash.NewChip(g.Config(n))
			require.NoError(t, chip.Err(), g.Name)
			size := chip.Flashes()[0].Size()
			require.GreaterOrEqual(t, size, max(n, 1), g.Name)
			require.Less(t, size, n+256<<10, g.Name)
		}
	}
}
