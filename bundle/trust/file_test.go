package trust

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// Both firmwares of a device, the old and the new, get along with the file.
func TestLoadSave(t *testing.T) {
	m := newTeam(t)
	a := m.open(t)
	name := filepath.Join(t.TempDir(), "trust")
	b, err := Load(name, a.Bytes())
	require.NoError(t, err)
	require.Equal(t, a.Bytes(), b.Bytes(), "there is no file yet")

	two := signRecord(t, m.next(), m.root...)
	b, err = a.Update(two)
	require.NoError(t, err)
	require.NoError(t, b.Save(name))
	require.NoError(t, b.Save(name), "again")
	entries, err := os.ReadDir(filepath.Dir(name))
	require.NoError(t, err)
	require.Len(t, entries, 1)
	if runtime.GOOS != "windows" {
		info, err := os.Stat(name)
		require.NoError(t, err)
		require.Zero(t, info.Mode().Perm()&0o022, "others must not write it")
	}
	c, err := Load(name, a.Bytes())
	require.NoError(t, err)
	require.Equal(t, uint64(2), c.Record().Version)

	third := m.next()
	third.Version = 3
	newer, err := b.Update(signRecord(t, third, m.root...))
	require.NoError(t, err)
	c, err = Load(name, newer.Bytes())
	require.NoError(t, err, "a firmware with a newer chain than the file")
	require.Equal(t, uint64(3), c.Record().Version)
	require.NoError(t, c.Save(name))
	c, err = Load(name, a.Bytes())
	require.NoError(t, err, "and back to the old firmware")
	require.Equal(t, uint64(3), c.Record().Version)
}

// Neither damage nor somebody else's record brings in other keys, or old ones.
func TestLoadRefuses(t *testing.T) {
	m, mallory := newTeam(t), newTeam(t)
	a := m.open(t)
	b, err := a.Update(signRecord(t, m.next(), m.root[:2]...))
	require.NoError(t, err)
	name := filepath.Join(t.TempDir(), "trust")
	good := b.Bytes()
	load := func(content []byte) error {
		require.NoError(t, os.WriteFile(name, content, 0o600))
		_, err := Load(name, a.Bytes())
		return err
	}
	require.NoError(t, load(good))
	for i := range good {
		c := slices.Clone(good)
		c[i] ^= 4
		got, err := a.Update(c) // what Load does with the file
		if err != nil {
			requireTyped(t, err, "byte %d", i)
			continue
		}
		// A signature of the first record, which is built in, may be anything.
		require.Equal(t, string(good), string(got.Bytes()), "byte %d", i)
	}
	require.ErrorIs(t, load(append(slices.Clone(good), 'x')), ErrFormat)
	require.ErrorIs(t, load(mallory.open(t).Bytes()), ErrFork)
	require.ErrorIs(t, load(signRecord(t, mallory.next(), mallory.root...)), ErrUnsigned)
	require.ErrorIs(t, load(nil), ErrFormat)
	require.ErrorIs(t, load(make([]byte, MaxChain+10)), ErrTooLarge)
	require.NoError(t, load(a.Bytes()), "an older chain is no damage")

	require.NoError(t, os.Remove(name))
	require.NoError(t, os.Mkdir(name, 0o700))
	_, err = Load(name, a.Bytes())
	require.ErrorContains(t, err, "not a regular file")
	_, err = Load(name, nil)
	require.ErrorIs(t, err, ErrFormat)
	require.Error(t, b.Save(name), "a directory is in the way")
	require.Error(t, b.Save(filepath.Join(name, "no", "directory")))
}

var errOff = errors.New("no power")

// disk is a file system that loses what was not synced when the power goes off at
// operation number at.
type disk struct {
	n, at  int
	after  bool // the operation is done before
	fail   bool // the operation fails instead, and the power stays on
	off    bool
	names  map[string]*file // as seen
	synced map[string]*file // as on the medium
}

type file struct {
	d            *disk
	data, synced []byte
}

func (d *disk) op(do func()) error {
	if d.off {
		return errOff
	}
	d.n++
	if d.n-1 == d.at {
		if d.after {
			do()
		}
		d.off = !d.fail
		return errOff
	}
	do()
	return nil
}

func (d *disk) create(name string) (newFile, error) {
	if d.names[name] != nil {
		return nil, fs.ErrExist
	}
	f := &file{d: d}
	return f, d.op(func() { d.names[name] = f })
}

func (d *disk) rename(from, to string) error {
	return d.op(func() { d.names[to] = d.names[from]; delete(d.names, from) })
}

func (d *disk) remove(name string) error {
	if d.names[name] == nil {
		return fs.ErrNotExist
	}
	return d.op(func() { delete(d.names, name) })
}

func (d *disk) syncDir(string) error {
	return d.op(func() { d.synced = maps.Clone(d.names) })
}

func (f *file) Write(p []byte) (int, error) {
	return len(p), f.d.op(func() { f.data = append(f.data, p...) })
}
func (f *file) Sync() error  { return f.d.op(func() { f.synced = slices.Clone(f.data) }) }
func (f *file) Close() error { return f.d.op(func() {}) }

// Wherever the power fails, and whatever of the names and of the data was on the
// medium by then, the file is the old one or the new one; a save that has said yes
// stays. What an interrupted one left behind does not disturb the next.
func TestSavePowerCut(t *testing.T) {
	const name = "/data/trust"
	content := func(f *file, mode int) string {
		switch {
		case mode == 1: // all that was written
			return string(f.data)
		case mode == 2 && len(f.data) > len(f.synced): // a part of it
			return string(f.data[:(len(f.synced)+len(f.data))/2])
		}
		return string(f.synced)
	}
	runs := 0
	for _, was := range []string{"", "old"} {
		for _, how := range []struct{ after, fail bool }{{false, false}, {true, false}, {false, true}} {
			for at := 0; ; at++ {
				require.Less(t, at, 50)
				d := &disk{at: at, after: how.after, fail: how.fail, names: map[string]*file{}}
				if was != "" {
					d.names[name] = &file{d: d, data: []byte(was), synced: []byte(was)}
					d.names[name+tempSuffix] = &file{d: d, data: []byte("junk")}
				}
				d.synced = maps.Clone(d.names)
				err := save(d, name, []byte("new"))
				runs++
				for mode := range 3 {
					for _, names := range []map[string]*file{d.synced, d.names} {
						got := ""
						if f := names[name]; f != nil {
							got = content(f, mode)
						}
						if err == nil {
							require.Equal(t, "new", got)
						} else {
							require.Contains(t, []string{was, "new"}, got, "operation %d", at)
						}
					}
				}
				done := !d.off && err == nil
				d.at, d.off = -1, false
				require.NoError(t, save(d, name, []byte("newer")))
				require.Equal(t, "newer", string(d.synced[name].synced))
				require.Len(t, d.synced, 1)
				if done {
					break
				}
			}
		}
	}
	require.Greater(t, runs, 30)
}
