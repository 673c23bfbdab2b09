package bootrecord

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/slotota/ota"
	"github.com/stretchr/testify/require"
)

func openFiles(t *testing.T, paths []string) *Record {
	t.Helper()
	r, err := Files(paths, nil)
	require.NoError(t, err)
	return r
}

func TestFiles(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	var paths []string
	for _, sub := range []string{"a", "b", "c"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, sub), 0o700))
		paths = append(paths, filepath.Join(dir, sub, "boot"))
	}
	r := openFiles(t, paths)
	_, err := r.Load(ctx)
	require.ErrorIs(t, err, ota.ErrNoBootState)
	for _, s := range states() {
		require.NoError(t, r.Store(ctx, s))
		got, err := openFiles(t, paths).Load(ctx)
		require.NoError(t, err)
		requireState(t, s, got)
	}
	require.NoError(t, r.Store(ctx, state(1)))
	good, err := os.ReadFile(paths[0])
	require.NoError(t, err)

	entries := func() (names []string) {
		for _, p := range paths {
			es, err := os.ReadDir(filepath.Dir(p))
			require.NoError(t, err)
			for _, e := range es {
				names = append(names, e.Name())
			}
		}
		return names
	}
	require.Equal(t, []string{"boot", "boot", "boot"}, entries())

	// Nothing is written while all is well.
	before, err := os.Stat(paths[1])
	require.NoError(t, err)
	require.NoError(t, r.Store(ctx, state(1)))
	_, err = r.Heal(ctx)
	require.NoError(t, err)
	after, err := os.Stat(paths[1])
	require.NoError(t, err)
	require.True(t, os.SameFile(before, after))

	// What an interrupted write left behind goes away, also if it is a directory.
	require.NoError(t, os.WriteFile(paths[0]+tempSuffix, good[:20], 0o600))
	require.NoError(t, os.Mkdir(paths[2]+tempSuffix, 0o700))
	_, err = openFiles(t, paths).Heal(ctx)
	require.NoError(t, err)
	require.Equal(t, []string{"boot", "boot", "boot"}, entries())

	// One copy damaged, in every way.
	for name, damage := range map[string]func(p string) error{
		"missing": os.Remove,
		"empty":   func(p string) error { return os.Truncate(p, 0) },
		"short":   func(p string) error { return os.Truncate(p, 60) },
		"long":    func(p string) error { return os.WriteFile(p, make([]byte, 100000), 0o600) },
		"other":   func(p string) error { return os.WriteFile(p, []byte("hello"), 0o600) },
	} {
		for _, p := range paths {
			require.NoError(t, damage(p), name)
			s, err := openFiles(t, paths).Heal(ctx)
			require.NoError(t, err, name)
			requireState(t, state(1), s)
			r := openFiles(t, paths)
			_, err = r.Load(ctx)
			require.NoError(t, err)
			require.Equal(t, 3, r.Health().Good, name)
		}
	}

	// A directory in the place of a file is an error, and stays one.
	require.NoError(t, os.Remove(paths[1]))
	require.NoError(t, os.Mkdir(paths[1], 0o700))
	r = openFiles(t, paths)
	s, err := r.Heal(ctx)
	require.NoError(t, err)
	requireState(t, state(1), s)
	require.Equal(t, 2, r.Health().Good)
	require.NoError(t, r.Store(ctx, state(2)))
	require.Error(t, r.Health().Errs[1])
	require.NoFileExists(t, paths[1]+tempSuffix)
	require.NoError(t, os.Remove(paths[0]))
	require.NoError(t, os.Remove(paths[2]))
	_, err = openFiles(t, paths).Load(ctx)
	require.ErrorIs(t, err, ota.ErrInvalid)
	require.NotErrorIs(t, err, ota.ErrNoBootState)

	// So is a directory that does not exist.
	_, err = openFiles(t, []string{filepath.Join(dir, "no", "a"), paths[0]}).Load(ctx)
	require.ErrorIs(t, err, fs.ErrNotExist)
	require.NotErrorIs(t, err, ota.ErrNoBootState)
}

func TestFilesRefuses(t *testing.T) {
	dir := t.TempDir()
	a := filepath.Join(dir, "a")
	for _, paths := range [][]string{
		nil, {a}, {a, ""}, {a, filepath.Join(dir, "x", "..", "a")}, {a, a + tempSuffix}, {a + tempSuffix, a},
		{a, "b", "c", "d", "e", "f", "g", "h", "i"},
	} {
		r, err := Files(paths, nil)
		require.ErrorIs(t, err, ota.ErrInvalid, "%q", paths)
		require.Nil(t, r)
	}
}

// TestFilesUnreadable: a symbolic link to itself cannot be read, not even by root.
func TestFilesUnreadable(t *testing.T) {
	dir := t.TempDir()
	paths := []string{filepath.Join(dir, "a"), filepath.Join(dir, "b")}
	for _, p := range paths {
		if err := os.Symlink(p, p); err != nil {
			t.Skip("no symbolic links here:", err)
		}
	}
	_, err := openFiles(t, paths).Load(t.Context())
	require.Error(t, err)
	require.NotErrorIs(t, err, ota.ErrNoBootState)
	require.NotErrorIs(t, err, ota.ErrBadBootState)
}

var errOff = errors.New("off")

// crashFS is a file system that fails, or loses its power, at one operation.
type crashFS struct {
	at, n  int
	fail   bool // the operation fails; otherwise the power goes off
	after  bool // the operation is done before
	off    bool
	mode   int               // what a power cut does to what was not synced
	dir    map[string]*inode // as seen
	disk   map[string]*inode // as synced
	reads  int
	synced []string
}

// The modes: all is lost, all is kept, names are kept but data is lost or
// kept in part.
const (
	keepNothing = iota
	keepAll
	keepNames
	keepHalf
	modes
)

type inode struct {
	data   []byte
	synced []byte
}

func newCrashFS() *crashFS {
	return &crashFS{at: -1, dir: map[string]*inode{}, disk: map[string]*inode{}}
}

func (c *crashFS) clone() *crashFS {
	d := newCrashFS()
	for name, f := range c.dir {
		g := &inode{slices.Clone(f.data), slices.Clone(f.synced)}
		d.dir[name], d.disk[name] = g, g
	}
	return d
}

// op does an operation, or not.
func (c *crashFS) op(do func() error) error {
	if c.off {
		return errOff
	}
	n := c.n
	c.n++
	if n != c.at {
		return do()
	}
	if c.after {
		_ = do()
	}
	c.off = !c.fail
	return errOff
}

func (c *crashFS) powerOn() {
	if !c.off {
		return
	}
	c.off = false
	if c.mode == keepNothing {
		c.dir = maps.Clone(c.disk)
	}
	for _, f := range c.dir {
		if slices.Equal(f.data, f.synced) {
			continue
		}
		switch c.mode {
		case keepNothing, keepNames:
			f.data = slices.Clone(f.synced)
		case keepHalf:
			f.data = f.data[:len(f.data)/2]
		}
		f.synced = slices.Clone(f.data)
	}
	c.disk = maps.Clone(c.dir)
}

func (c *crashFS) read(name string) ([]byte, error) {
	c.reads++
	if c.off {
		return nil, errOff
	}
	if f := c.dir[name]; f != nil {
		return slices.Clone(f.data), nil
	}
	return nil, nil
}

func (c *crashFS) create(name string) (newFile, error) {
	f := &inode{}
	err := c.op(func() error {
		if c.dir[name] != nil {
			return fs.ErrExist
		}
		c.dir[name] = f
		return nil
	})
	return &crashFile{c, f}, err
}

func (c *crashFS) rename(from, to string) error {
	return c.op(func() error {
		c.dir[to] = c.dir[from]
		delete(c.dir, from)
		return nil
	})
}

func (c *crashFS) remove(name string) error {
	if c.dir[name] == nil {
		return fs.ErrNotExist
	}
	return c.op(func() error {
		delete(c.dir, name)
		return nil
	})
}

func (c *crashFS) syncDir(name string) error {
	return c.op(func() error {
		c.synced = append(c.synced, name)
		maps.DeleteFunc(c.disk, func(p string, _ *inode) bool { return filepath.Dir(p) == name })
		for p, f := range c.dir {
			if filepath.Dir(p) == name {
				c.disk[p] = f
			}
		}
		return nil
	})
}

type crashFile struct {
	c *crashFS
	f *inode
}

func (f *crashFile) Write(p []byte) (int, error) {
	err := f.c.op(func() error { f.f.data = append(f.f.data, p...); return nil })
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (f *crashFile) Sync() error {
	return f.c.op(func() error { f.f.synced = slices.Clone(f.f.data); return nil })
}

func (f *crashFile) Close() error { return f.c.op(func() error { return nil }) }

// TestFilesPowerCut cuts the power, or has an operation fail, at each of them.
func TestFilesPowerCut(t *testing.T) {
	ctx := t.Context()
	for k := 2; k <= 4; k++ {
		var paths, dirs []string
		for i := range k {
			dirs = append(dirs, fmt.Sprintf("%cd%d", filepath.Separator, i))
			abs, err := filepath.Abs(filepath.Join(dirs[i], "boot"))
			require.NoError(t, err)
			paths = append(paths, abs)
			dirs[i] = filepath.Dir(abs)
		}
		open := func(c *crashFS) *Record {
			r, err := files(paths, nil, c)
			require.NoError(t, err)
			return r
		}
		base := newCrashFS()
		require.NoError(t, open(base).Store(ctx, state(1)))
		require.ElementsMatch(t, dirs, base.synced)
		require.Len(t, base.dir, k)
		for mode := range modes {
			for _, after := range []bool{false, true} {
				for _, fail := range []bool{false, true} {
					for at := 0; ; at++ {
						msg := fmt.Sprintf("%d copies, mode %d, after %v, fail %v, at %d", k, mode, after, fail, at)
						c := base.clone()
						c.at, c.mode, c.after, c.fail = at, mode, after, fail
						err := open(c).Store(ctx, state(2))
						over := c.n <= at
						if over {
							require.NoError(t, err, msg)
						}
						c.at = -1
						if fail {
							// A later cut must not undo what was stored.
							c.off = true
						}
						c.powerOn()
						want := err
						got, err := open(c).Heal(ctx)
						require.NoError(t, err, msg)
						if want == nil {
							requireState(t, state(2), got)
						} else {
							require.True(t, got.Equal(state(1)) || got.Equal(state(2)), msg)
						}
						again, err := open(c).Heal(ctx)
						require.NoError(t, err, msg)
						requireState(t, got, again)
						require.Len(t, c.dir, k, msg) // no files left over
						for _, p := range paths {
							require.Equal(t, c.dir[paths[0]].data, c.dir[p].data, msg)
						}
						if over {
							break
						}
					}
				}
			}
		}
	}
}
