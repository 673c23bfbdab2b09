package efibootguard

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/fsys"
	"github.com/slotota/ota/internal/loadertest"
)

var (
	long   = flag.Bool("crash.long", false, "cut the power twice as well")
	replay = flag.String("crash.replay", "", "repeat the run of this text")
)

func golden(t testing.TB) []byte {
	f, err := os.Open("testdata/BGENV.DAT.gz") // made by bg_setenv
	require.NoError(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	require.NoError(t, err)
	b, err := io.ReadAll(z)
	require.NoError(t, err)
	return b
}

func TestGolden(t *testing.T) {
	b := golden(t)
	e, err := ParseEnv(b)
	require.NoError(t, err)
	require.Equal(t, "C:KERNEL1:vmlinuz", e.Kernel())
	require.Equal(t, `console=ttyS0 quiet initrd=\initrd ota.slot=A panic=1`, e.Args())
	require.Equal(t, OK, e.State())
	require.Equal(t, uint32(2), e.Revision())
	require.Equal(t, 20*time.Second, e.Watchdog())
	require.False(t, e.InProgress())
	require.Equal(t, b, e.Bytes())

	f := NewEnv()
	require.NoError(t, errors.Join(f.SetKernel(e.Kernel()), f.SetArgs(e.Args()), f.SetWatchdog(e.Watchdog())))
	f.SetRevision(2)
	require.Equal(t, b, f.Bytes())
}

func TestEnv(t *testing.T) {
	b := golden(t)
	for _, bad := range [][]byte{nil, b[:len(b)-1], append(slices.Clone(b), 0), make([]byte, Size)} {
		if len(bad) == Size {
			bad[7] = 1
		}
		_, err := ParseEnv(bad)
		require.ErrorIs(t, err, ErrFormat)
	}
	e := NewEnv()
	require.NoError(t, e.SetArgs(strings.Repeat("x", MaxString)))
	require.ErrorIs(t, e.SetArgs(strings.Repeat("x", MaxString+1)), ota.ErrInvalid)
	require.ErrorIs(t, e.SetKernel("a\x00b"), ota.ErrInvalid)
	require.Len(t, e.Args(), MaxString)
	require.NoError(t, e.SetArgs("ä😀"))
	require.Equal(t, "ä😀", e.Args())
	for _, bad := range []time.Duration{-time.Second, time.Millisecond, 65536 * time.Second} {
		require.ErrorIs(t, e.SetWatchdog(bad), ota.ErrInvalid)
	}
	e.SetInProgress(true)
	require.True(t, e.InProgress())
	e.SetInProgress(false)
	require.False(t, e.InProgress())
	require.Equal(t, "FAILED", Failed.String())
	require.Equal(t, "UNKNOWN (7)", State(7).String())
}

// sparse is a file system that keeps some bytes of environments only: those in tests
// have nothing elsewhere.
type sparse struct{ fsys.FS }

var kept = [][2]int{{offKernel, 40}, {offArgs, offArgs + 20}, {offInProgress, offUser + 32}, {offSum, Size}}

func isEnv(name string) bool { return strings.HasPrefix(path.Base(name), "BGENV.DAT") }

func (s sparse) WriteFile(name string, b []byte) error {
	if isEnv(name) {
		var short []byte
		for _, k := range kept {
			short = append(short, b[k[0]:k[1]]...)
		}
		b = short
	}
	return s.FS.WriteFile(name, b)
}

func (s sparse) ReadFile(name string) ([]byte, error) {
	b, err := s.FS.ReadFile(name)
	if err != nil || !isEnv(name) {
		return b, err
	}
	full := make([]byte, Size)
	for _, k := range kept {
		n := copy(full[k[0]:k[1]], b)
		b = b[n:]
		if n < k[1]-k[0] {
			return full[:k[0]+n], nil // torn
		}
	}
	return full, nil
}

const user = "board\x00\x0d\x00\x00\x00text\x00keep\x00"

// factory is what a new device has.
func factory(f fsys.FS, dirs ...string) error {
	for i, dir := range dirs {
		e := NewEnv()
		err := errors.Join(e.SetKernel(fmt.Sprintf("C:KERNEL%d:vmlinuz", i)), e.SetArgs("quiet"), e.SetWatchdog(30*time.Second))
		e.SetRevision(uint32(2 - i))
		copy(e.b[offUser:], user)
		if err := errors.Join(err, fsys.Replace(f, dir+"/BGENV.DAT", e.Bytes())); err != nil {
			return err
		}
	}
	return nil
}

// guard does what EFI Boot Guard does at a reset, step by step as in its source, and
// returns the slot that it starts.
func guard(f fsys.FS, files [2]string) (ota.SlotID, error) {
	type data struct {
		state    byte
		progress bool
		revision uint32
		raw      []byte
	}
	var env [2]data
	var invalid [2]bool
	for i, name := range files {
		b, err := f.ReadFile(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return ota.NoSlot, err
		}
		if len(b) < Size || crc32.ChecksumIEEE(b[:Size-4]) != binary.LittleEndian.Uint32(b[Size-4:]) {
			invalid[i] = true
			continue
		}
		env[i] = data{b[1021], b[1020] == 1, binary.LittleEndian.Uint32(b[1024:]), b}
	}
	var latest, before uint32
	li, bi := 0, 0
	for i := range env {
		if invalid[i] {
			continue
		}
		if env[i].revision > latest {
			before, bi = latest, li
			latest, li = env[i].revision, i
		} else if env[i].revision > before {
			before, bi = env[i].revision, i
		}
	}
	save := func(state byte, revision uint32) error {
		b := slices.Clone(env[li].raw)
		b[1021] = state
		binary.LittleEndian.PutUint32(b[1024:], revision)
		binary.LittleEndian.PutUint32(b[Size-4:], crc32.ChecksumIEEE(b[:Size-4]))
		return f.WriteFile(files[li], b) // in place
	}
	current := li
	var err error
	switch {
	case env[li].progress:
		current = bi
	case env[li].state == 2:
		err = save(3, 0)
		current = bi
	case env[li].state == 1:
		err = save(2, env[li].revision)
	}
	if invalid[current] || env[current].raw == nil {
		return ota.NoSlot, errors.New("starts from an environment that is not there")
	}
	return ota.SlotID(current), err
}

var simFiles = [2]string{"/a/BGENV.DAT", "/b/BGENV.DAT"}

func slots(files [2]string) []Slot {
	return []Slot{
		{File: files[0], Name: "A", Kernel: "C:KERNEL0:vmlinuz", Args: "quiet"},
		{File: files[1], Name: "B", Kernel: "C:KERNEL1:vmlinuz", Args: "quiet"},
	}
}

func loader() *loadertest.Loader {
	sim := func(flashes []ota.Flash, reset bool) (fsys.FS, error) {
		s, err := fsys.NewSim(flashes, reset)
		return sparse{s}, err
	}
	return &loadertest.Loader{
		Name:    "efibootguard",
		Flashes: []memflash.Config{{Size: fsys.SimSize}, {Size: fsys.SimSize}},
		Format: func(flashes []ota.Flash) error {
			f, err := sim(flashes, true)
			if err != nil {
				return err
			}
			return factory(f, "/a", "/b")
		},
		Open: func(flashes []ota.Flash, running func(context.Context) (ota.SlotID, error)) (driver.Driver, error) {
			f, err := sim(flashes, false)
			if err != nil {
				return nil, err
			}
			return New(&Config{Slots: slots(simFiles), Running: running, files: f})
		},
		Boot: func(_ context.Context, flashes []ota.Flash) (ota.SlotID, error) {
			f, err := sim(flashes, true)
			if err != nil {
				return ota.NoSlot, err
			}
			return guard(f, simFiles)
		},
		Intact: func(flashes []ota.Flash) error {
			f, err := sim(flashes, false)
			if err != nil {
				return err
			}
			for i, name := range simFiles {
				b, err := f.ReadFile(name)
				if err != nil {
					return err
				}
				e, err := ParseEnv(b)
				if err != nil && i == 1 {
					continue // torn by the loader
				}
				if err != nil {
					return err
				}
				if e.Watchdog() != 30*time.Second || !bytes.HasPrefix(e.b[offUser:], []byte(user)) && e.State() != Installed || e.Args() != "quiet" {
					return fmt.Errorf("%s: watchdog %v, arguments %q, variables %q", name, e.Watchdog(), e.Args(), e.b[offUser:offUser+40])
				}
			}
			return nil
		},
		Weak:   true, // the loader writes nothing at most boots
		Replay: *replay, Twice: *long,
	}
}

func TestConformance(t *testing.T) { loader().Conformance(t) }

func TestTransitions(t *testing.T) { loader().Transitions(t) }

func TestPowerCuts(t *testing.T) { loader().PowerCuts(t) }

func committed(id ota.SlotID) driver.Choice { return driver.Choice{Active: id, Revert: ota.NoSlot} }

// bench returns a machine in a directory.
func bench(t *testing.T) (*Driver, [2]string) {
	dir := t.TempDir()
	var files [2]string
	for i, n := range []string{"a", "b"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, n), 0o700))
		files[i] = filepath.ToSlash(filepath.Join(dir, n, "BGENV.DAT"))
	}
	require.NoError(t, factory(fsys.OS{}, filepath.ToSlash(filepath.Join(dir, "a")), filepath.ToSlash(filepath.Join(dir, "b"))))
	d, err := New(&Config{Slots: slots(files)})
	require.NoError(t, err)
	return d, files
}

// TestLife takes a device through installs that fail, and one that is committed, with
// the loader in between.
func TestLife(t *testing.T) {
	ctx := t.Context()
	d, files := bench(t)
	boot := func(want ota.SlotID) {
		t.Helper()
		got, err := guard(fsys.OS{}, files)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	read := func(want driver.Choice) {
		t.Helper()
		c, err := d.Read(ctx)
		require.NoError(t, err)
		require.Equal(t, want, c)
	}
	read(committed(0))
	boot(0)
	trial := driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}
	under := driver.Choice{Active: 1, Trial: true, Revert: 0, Booted: true}
	for range 2 {
		require.NoError(t, d.Write(ctx, trial))
		read(trial)
		boot(1)
		read(under)
		boot(0)
		read(committed(0))
		boot(0)
	}
	// Called off, and given up while it runs.
	require.NoError(t, d.Write(ctx, trial))
	require.NoError(t, d.Write(ctx, committed(0)))
	boot(0)
	require.NoError(t, d.Write(ctx, trial))
	boot(1)
	require.NoError(t, d.Write(ctx, committed(0)))
	read(committed(0))
	boot(0)
	// Committed.
	require.NoError(t, d.Write(ctx, trial))
	boot(1)
	require.NoError(t, d.Write(ctx, committed(1)))
	read(committed(1))
	boot(1)
	// The running one on trial, the other one, which has failed before, to go
	// back to.
	require.NoError(t, d.Write(ctx, committed(0)))
	require.NoError(t, d.Write(ctx, driver.Choice{Active: 0, Trial: true, Revert: 1, Tries: 1}))
	boot(0)
	boot(1)
	boot(1)
}

// TestInProgress: what another program has begun to install is passed over.
func TestInProgress(t *testing.T) {
	ctx := t.Context()
	d, files := bench(t)
	es, err := d.load(ctx)
	require.NoError(t, err)
	es[1].SetInProgress(true)
	es[1].SetRevision(9)
	es[1].SetState(Installed)
	require.NoError(t, os.WriteFile(files[1], es[1].Bytes(), 0o600))
	c, err := d.Read(ctx)
	require.NoError(t, err)
	require.Equal(t, committed(0), c)
	require.NoError(t, d.Write(ctx, driver.Choice{Active: 1, Trial: true, Tries: 1}))
	id, err := guard(fsys.OS{}, files)
	require.NoError(t, err)
	require.Equal(t, ota.SlotID(1), id)
}

func TestWatchdog(t *testing.T) {
	ctx := t.Context()
	d, files := bench(t)
	w, err := d.Watchdog(ctx, 1)
	require.NoError(t, err)
	require.Equal(t, 30*time.Second, w)
	_, err = d.Watchdog(ctx, 2)
	require.ErrorIs(t, err, ota.ErrUnknownSlot)
	d, err = New(&Config{Slots: slots(files), Watchdog: time.Minute})
	require.NoError(t, err)
	require.NoError(t, d.Write(ctx, driver.Choice{Active: 1, Trial: true, Tries: 1}))
	for id, want := range []time.Duration{30 * time.Second, time.Minute} {
		w, err := d.Watchdog(ctx, ota.SlotID(id))
		require.NoError(t, err)
		require.Equal(t, want, w)
	}
}

// TestDamage: one sound file is enough, none is refused, and a file is made anew only
// if it is known what it must say.
func TestDamage(t *testing.T) {
	ctx := t.Context()
	d, files := bench(t)
	trial := driver.Choice{Active: 1, Trial: true, Tries: 1}
	require.NoError(t, os.WriteFile(files[1], []byte("torn"), 0o600))
	_, err := d.Watchdog(ctx, 1)
	require.ErrorIs(t, err, ErrFormat)
	c, err := d.Read(ctx)
	require.NoError(t, err)
	require.Equal(t, committed(0), c)
	keep := slots(files)
	keep[1].Kernel = ""
	k, err := New(&Config{Slots: keep})
	require.NoError(t, err)
	require.ErrorIs(t, k.Write(ctx, trial), ota.ErrInvalid)
	require.NoError(t, d.Write(ctx, trial))
	c, err = d.Read(ctx)
	require.NoError(t, err)
	require.Equal(t, ota.SlotID(1), c.Active)

	es, err := d.load(ctx)
	require.NoError(t, err)
	es[0].SetRevision(math.MaxUint32)
	require.NoError(t, os.WriteFile(files[0], es[0].Bytes(), 0o600))
	require.ErrorIs(t, d.Write(ctx, trial), ota.ErrInvalid)

	for _, name := range files {
		require.NoError(t, os.WriteFile(name, []byte("torn"), 0o600))
	}
	_, err = d.Read(ctx)
	require.ErrorIs(t, err, ota.ErrBadBootState)
	require.ErrorIs(t, d.Write(ctx, trial), ota.ErrBadBootState)
	for _, name := range files {
		require.NoError(t, os.Remove(name))
	}
	_, err = d.Read(ctx)
	require.ErrorIs(t, err, ota.ErrNoBootState)
	require.ErrorIs(t, d.Write(ctx, trial), ota.ErrNoBootState)
	require.NoError(t, os.Mkdir(files[0], 0o700))
	_, err = d.Read(ctx)
	require.Error(t, err)
	require.NotErrorIs(t, err, ota.ErrNoBootState)
}

func TestBadConfig(t *testing.T) {
	for _, s := range [][]Slot{
		nil,
		{{File: "a", Name: "A"}},
		{{File: "a", Name: "A"}, {File: "a", Name: "B"}},
		{{File: "a", Name: "A"}, {File: "b", Name: "A"}},
		{{File: "a", Name: "A"}, {File: "b"}},
		{{File: "a", Name: "A"}, {Name: "B"}},
		{{File: "a", Name: "A"}, {File: "b", Name: "B", Kernel: strings.Repeat("x", 300)}},
	} {
		_, err := New(&Config{Slots: s})
		require.ErrorIs(t, err, ota.ErrInvalid)
	}
	_, err := New(&Config{Slots: slots(simFiles), Watchdog: -1})
	require.ErrorIs(t, err, ota.ErrInvalid)
	d, _ := bench(t)
	for _, c := range []driver.Choice{
		{Active: 2}, {Active: -1}, {Trial: true, Revert: -1, Tries: 1}, {Trial: true, Tries: 1}, {Active: 1, Revert: 2},
		{Active: 1, Trial: true, Tries: 2}, {Active: 1, Trial: true}, {Active: 1, Trial: true, Booted: true, Tries: 1},
	} {
		require.Error(t, d.Write(t.Context(), c), "%+v", c)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = d.Read(ctx)
	require.ErrorIs(t, err, context.Canceled)
}

// tool runs a program of the Debian package efibootguard.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		msg := name + " is not installed: apt-get install efibootguard"
		if os.Getenv("CI") == "true" {
			t.Fatal(msg)
		}
		t.Skip(msg)
	}
	out, err := exec.CommandContext(t.Context(), p, args...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return string(out)
}

// TestTool: what bg_setenv writes is read here, what is written here bg_printenv
// reads, and neither loses what the other one has set.
func TestTool(t *testing.T) {
	name := filepath.Join(t.TempDir(), "BGENV.DAT")
	tool(t, "bg_setenv", "-f", name, "-r", "3", "-s", "0", "-k", "x", "-x", "board=keep")
	rnd := rand.New(rand.NewPCG(7, 8))
	words := []string{"C:A:vmlinuz", "L:ESP:linux.efi", "quiet root=/dev/sda1", strings.Repeat("v", MaxString), "x"}
	for i := range 40 {
		b, err := os.ReadFile(name)
		require.NoError(t, err)
		e, err := ParseEnv(b)
		require.NoError(t, err)
		kernel, args := words[rnd.IntN(len(words))], words[rnd.IntN(len(words))]
		revision, state, dog := rnd.Uint32N(math.MaxInt32), State(rnd.IntN(4)), rnd.IntN(0x10000)
		progress := rnd.IntN(2)
		if i%2 == 0 {
			require.NoError(t, errors.Join(e.SetKernel(kernel), e.SetArgs(args), e.SetWatchdog(time.Duration(dog)*time.Second)))
			e.SetRevision(revision)
			e.SetState(state)
			e.SetInProgress(progress == 1)
			require.NoError(t, os.WriteFile(name, e.Bytes(), 0o600))
		} else {
			tool(t, "bg_setenv", "-P", "-f", name, "-r", fmt.Sprint(revision), "-s", fmt.Sprint(int(state)),
				"-w", fmt.Sprint(dog), "-k", kernel, "-a", args, "-i", fmt.Sprint(progress))
			b, err := os.ReadFile(name)
			require.NoError(t, err)
			e, err = ParseEnv(b)
			require.NoError(t, err)
		}
		require.Equal(t, kernel, e.Kernel())
		require.Equal(t, args, e.Args())
		require.Equal(t, revision, e.Revision())
		require.Equal(t, state, e.State())
		require.Equal(t, time.Duration(dog)*time.Second, e.Watchdog())
		require.Equal(t, progress == 1, e.InProgress())
		out := tool(t, "bg_printenv", "-f", name)
		for _, line := range []string{
			fmt.Sprintf("revision:         %d\n", revision),
			"kernel:           " + kernel + "\n",
			"kernelargs:       " + args + "\n",
			fmt.Sprintf("watchdog timeout: %d seconds\n", dog),
			fmt.Sprintf("ustate:           %d (%v)\n", state, state),
			"in_progress:      " + []string{"no", "yes"}[progress] + "\n",
			"board = keep\n",
		} {
			require.Contains(t, out, line)
		}
	}
}

func FuzzEnv(f *testing.F) {
	f.Add(golden(f)[:offUser+64])
	f.Fuzz(func(t *testing.T, head []byte) {
		raw := make([]byte, Size)
		copy(raw[:offSum], head)
		if _, err := ParseEnv(head); err != nil {
			require.ErrorIs(t, err, ErrFormat)
		}
		binary.LittleEndian.PutUint32(raw[offSum:], crc32.ChecksumIEEE(raw[:offSum]))
		e, err := ParseEnv(raw)
		require.NoError(t, err)
		require.Equal(t, raw, e.Bytes())
		k := e.Kernel()
		g := NewEnv()
		require.NoError(t, g.SetKernel(k))
		require.Equal(t, k, g.Kernel())
	})
}
