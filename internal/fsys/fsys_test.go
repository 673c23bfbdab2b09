package fsys

import (
	"errors"
	"io/fs"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
)

func chip() *memflash.Chip {
	return memflash.NewChip(memflash.Config{Size: SimSize}, memflash.Config{Size: SimSize})
}

func mount(t *testing.T, c *memflash.Chip, reset bool) *Sim {
	s, err := NewSim(c.Flashes(), reset)
	require.NoError(t, err)
	return s
}

// TestSame: both file systems do the same.
func TestSame(t *testing.T) {
	for name, f := range map[string]FS{"os": OS{t.TempDir()}, "sim": mount(t, chip(), true)} {
		t.Run(name, func(t *testing.T) {
			_, err := f.ReadFile("/a")
			require.ErrorIs(t, err, fs.ErrNotExist)
			require.NoError(t, Replace(f, "/a", []byte("one")))
			require.NoError(t, Replace(f, "/a", []byte("two")))
			b, err := f.ReadFile("/a")
			require.NoError(t, err)
			require.Equal(t, "two", string(b))
			o, err := f.Open("/a")
			require.NoError(t, err)
			one := make([]byte, 1)
			_, err = o.ReadAt(one, 2)
			require.NoError(t, err)
			require.Equal(t, "o", string(one))
			require.NoError(t, o.Close())
			_, err = f.Open("/x")
			require.ErrorIs(t, err, fs.ErrNotExist)
			require.ErrorIs(t, f.Overwrite("/a", []byte("three")), fs.ErrInvalid)
			require.ErrorIs(t, f.Overwrite("/x", []byte("three")), fs.ErrNotExist)
			require.NoError(t, f.Overwrite("/a", []byte("six")))
			b, err = f.ReadFile("/a")
			require.NoError(t, err)
			require.Equal(t, "six", string(b))
			require.NoError(t, f.WriteFile("/b", []byte("three")))
			require.ErrorIs(t, Move(f, "/a", "/b"), fs.ErrExist)
			require.NoError(t, Move(f, "/a", "/c"))
			names, err := f.ReadDir("/")
			require.NoError(t, err)
			require.Equal(t, []string{"b", "c"}, names)
			require.NoError(t, f.Remove("/b"))
			require.ErrorIs(t, f.Remove("/b"), fs.ErrNotExist)
			require.ErrorIs(t, f.Rename("/b", "/x"), fs.ErrNotExist)
		})
	}
}

func TestTooLarge(t *testing.T) {
	f := OS{t.TempDir()}
	require.NoError(t, f.WriteFile("/a", make([]byte, MaxFile+1)))
	_, err := f.ReadFile("/a")
	require.ErrorIs(t, err, ota.ErrTooLarge)
}

type readOnly struct{ FS }

func (readOnly) WriteFile(string, []byte) error { return fs.ErrPermission }

// A Replace that fails says why, and not that a file is missing.
func TestReplaceFails(t *testing.T) {
	err := Replace(readOnly{OS{t.TempDir()}}, "/f", nil)
	require.ErrorIs(t, err, fs.ErrPermission)
	require.NotErrorIs(t, err, fs.ErrNotExist)
}

// TestReplaceIsAtomic cuts the power at every operation of a Replace: the file has
// its old content or the new one, never part of it. A write in place is caught.
func TestReplaceIsAtomic(t *testing.T) {
	older, newer := strings.Repeat("a", 100), strings.Repeat("b", 200)
	torn := func(write func(f FS, name string, b []byte) error) (bad, runs int) {
		for at := 0; ; at++ {
			for _, fault := range memflash.TearModes(uint64(at)) {
				c := chip()
				require.NoError(t, Replace(mount(t, c, true), "/f", []byte(older)))
				fault.At = c.Ops() + at
				c.Plan(fault)
				err := write(mount(t, c, false), "/f", []byte(newer))
				if c.Pending() > 0 {
					require.NoError(t, err)
					return bad, runs
				}
				runs++
				c.PowerOn()
				b, rerr := mount(t, c, true).ReadFile("/f")
				if rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
					require.NoError(t, rerr)
				}
				if string(b) != older && string(b) != newer || err == nil && string(b) != newer {
					bad++
				}
			}
		}
	}
	bad, runs := torn(Replace)
	require.Zero(t, bad)
	require.Greater(t, runs, 50)
	bad, _ = torn(func(f FS, name string, b []byte) error { return f.WriteFile(name, b) })
	require.Positive(t, bad)
}
