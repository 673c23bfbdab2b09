package rpi

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

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

// documented is the example in the documentation of the format.
const documented = "[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n"

func TestAutoboot(t *testing.T) {
	a, err := ParseAutoboot([]byte(documented))
	require.NoError(t, err)
	require.Equal(t, &Autoboot{Partition: 2, Tryboot: 3, AB: true}, a)
	b, err := a.Bytes()
	require.NoError(t, err)
	require.Equal(t, documented, string(b))

	for text, want := range map[string]Autoboot{
		"":                 {},
		"boot_partition=4": {Partition: 4, Tryboot: 4},
		"boot_partition=1\r\n[tryboot]\r\nboot_partition=2\r\n[all]\r\nboot_partition=3": {Partition: 3, Tryboot: 3},
		"[none]\nboot_partition=1\n[TRYBOOT]\n boot_partition = 0x2 \ntryboot_a_b=1":     {Tryboot: 2, AB: true, others: nil},
	} {
		a, err := ParseAutoboot([]byte(text))
		require.NoError(t, err, "%q", text)
		require.Equal(t, want.Partition, a.Partition, "%q", text)
		require.Equal(t, want.Tryboot, a.Tryboot, "%q", text)
		require.Equal(t, want.AB, a.AB, "%q", text)
	}
	for _, bad := range []string{"boot_partition=x", "boot_partition=256", "[tryboot]\nboot_partition=", strings.Repeat("#", MaxSize+1)} {
		_, err := ParseAutoboot([]byte(bad))
		require.ErrorIs(t, err, ErrFormat, "%q", bad)
	}
	// What is not ours stays, under its filter.
	const mixed = "# hand-made\nx=1\n[none]\nboot_partition=7\n[tryboot]\ny=2\nboot_partition=9\n[all]\nz=3\nboot_partition=8\n"
	a, err = ParseAutoboot([]byte(mixed))
	require.NoError(t, err)
	a.Partition, a.Tryboot, a.AB = 5, 6, true
	b, err = a.Bytes()
	require.NoError(t, err)
	require.Equal(t, "# hand-made\nx=1\n[none]\nboot_partition=7\n[tryboot]\ny=2\n[all]\nz=3\n[all]\ntryboot_a_b=1\nboot_partition=5\n[tryboot]\nboot_partition=6\n", string(b))
	a.others = append(a.others, strings.Repeat("#", MaxSize))
	_, err = a.Bytes()
	require.ErrorIs(t, err, ota.ErrTooLarge)
}

const (
	file     = "/boot/autoboot.txt"
	register = "/hardware/register" // the argument of the last restart
	boots    = "/hardware/boots"
)

// firmware does what the firmware does at a reset, with code of its own, and returns
// the partition that it boots.
func firmware(f fsys.FS) (int, error) {
	arg, err := f.ReadFile(register)
	if err == nil {
		err = f.Remove(register)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	try := string(arg) == "0 tryboot"
	b, err := f.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	partition, pass := 2, true // the first bootable one
	for _, l := range strings.Split(string(b), "\n") {
		switch {
		case l == "[all]":
			pass = true
		case l == "[none]":
			pass = false
		case l == "[tryboot]":
			pass = try
		case pass && strings.HasPrefix(l, "boot_partition="):
			if partition, err = strconv.Atoi(strings.TrimPrefix(l, "boot_partition=")); err != nil {
				return 0, err
			}
		}
	}
	n, err := f.ReadFile(boots)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	flagged := uint32(0)
	if try {
		flagged = 1
	}
	return partition, errors.Join(
		f.WriteFile("/dt/chosen/bootloader/partition", binary.BigEndian.AppendUint32(nil, uint32(partition))),
		f.WriteFile("/dt/chosen/bootloader/tryboot", binary.BigEndian.AppendUint32(nil, flagged)),
		f.WriteFile(boots, append(n, 'x')),
	)
}

func config(f fsys.FS) *Config {
	return &Config{
		Partitions: []int{2, 3}, File: file, DeviceTree: "/dt", BootID: boots, files: f,
		reboot: func(arg string) error {
			if arg == "" {
				return nil
			}
			return fsys.Replace(f, register, []byte(arg))
		},
	}
}

const others = "# of somebody else\n"

func loader() *loadertest.Loader {
	return &loadertest.Loader{
		Name:    "rpi",
		Flashes: []memflash.Config{{Size: fsys.SimSize}, {Size: fsys.SimSize}},
		Format: func(flashes []ota.Flash) error {
			s, err := fsys.NewSim(flashes, true)
			if err != nil {
				return err
			}
			return errors.Join(fsys.Replace(s, file, []byte(others+documented)), fsys.Replace(s, boots, []byte("x")))
		},
		Open: func(flashes []ota.Flash, running func(context.Context) (ota.SlotID, error)) (driver.Driver, error) {
			s, err := fsys.NewSim(flashes, false)
			if err != nil {
				return nil, err
			}
			c := config(s)
			c.Running = running
			return New(c)
		},
		Reset: func(ctx context.Context, flashes []ota.Flash) error {
			s, err := fsys.NewSim(flashes, false)
			if err != nil {
				return err
			}
			d, err := New(config(s))
			if err != nil {
				return err
			}
			return d.Reset(ctx)
		},
		Boot: func(_ context.Context, flashes []ota.Flash) (ota.SlotID, error) {
			s, err := fsys.NewSim(flashes, true)
			if err != nil {
				return ota.NoSlot, err
			}
			p, err := firmware(s)
			return ota.SlotID(p - 2), err
		},
		Intact: func(flashes []ota.Flash) error {
			s, err := fsys.NewSim(flashes, false)
			if err != nil {
				return err
			}
			b, err := s.ReadFile(file)
			if err != nil || !strings.HasPrefix(string(b), others) {
				return fmt.Errorf("autoboot.txt is %q (%v)", b, err)
			}
			return nil
		},
		Replay: *replay, Twice: *long,
	}
}

func TestConformance(t *testing.T) { loader().Conformance(t) }

// TestTransitions: without the argument the firmware boots the old default or the
// new one.
func TestTransitions(t *testing.T) { loader().Transitions(t) }

func TestPowerCuts(t *testing.T) { loader().PowerCuts(t) }

// bench is a machine in memory.
type bench struct {
	t *testing.T
	f fsys.FS
	d *Driver
}

func newBench(t *testing.T, text string) *bench {
	s, err := fsys.NewSim(memflash.NewChip(memflash.Config{Size: fsys.SimSize}, memflash.Config{Size: fsys.SimSize}).Flashes(), true)
	require.NoError(t, err)
	require.NoError(t, s.WriteFile(boots, []byte("x")))
	if text != "" {
		require.NoError(t, s.WriteFile(file, []byte(text)))
	}
	d, err := New(config(s))
	require.NoError(t, err)
	return &bench{t, s, d}
}

func (b *bench) boot(want ota.SlotID) {
	b.t.Helper()
	_, err := firmware(b.f)
	require.NoError(b.t, err)
	got, err := b.d.Running(b.t.Context())
	require.NoError(b.t, err)
	require.Equal(b.t, want, got)
}

func (b *bench) read(want driver.Choice) {
	b.t.Helper()
	c, err := b.d.Read(b.t.Context())
	require.NoError(b.t, err)
	require.Equal(b.t, want, c)
}

func (b *bench) write(c driver.Choice) {
	b.t.Helper()
	require.NoError(b.t, b.d.Write(b.t.Context(), c))
}

func (b *bench) reset() {
	b.t.Helper()
	require.NoError(b.t, b.d.Reset(b.t.Context()))
}

func committed(id ota.SlotID) driver.Choice { return driver.Choice{Active: id, Revert: ota.NoSlot} }

var (
	trial = driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}
	under = driver.Choice{Active: 1, Trial: true, Revert: 0, Booted: true}
)

// TestLife takes a device through installs that fail, and one that is committed, with
// the firmware in between.
func TestLife(t *testing.T) {
	b := newBench(t, documented)
	_, err := b.d.Running(t.Context())
	require.ErrorIs(t, err, ota.ErrUnknownSlot)
	b.boot(0)
	b.read(committed(0)) // the section alone is no trial
	b.write(trial)
	b.read(trial)
	b.reset()
	b.boot(1)
	b.read(under)
	b.reset() // not committed
	b.boot(0)
	b.read(under)
	b.write(committed(0))
	b.read(committed(0))
	// Called off.
	b.write(trial)
	b.write(committed(0))
	b.reset()
	b.boot(0)
	// Committed.
	b.write(trial)
	b.reset()
	b.boot(1)
	b.write(committed(1))
	b.read(committed(1))
	b.boot(1)
	b.read(committed(1))
	got, err := b.f.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "[all]\ntryboot_a_b=1\nboot_partition=3\n", string(got))
	// The running one on trial, the other one to go back to.
	b.write(driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1})
	b.reset()
	b.boot(1)
	b.boot(0)
}

// TestPowerCutBeforeReset: a trial that nobody begins stays pending, over any number
// of boots.
func TestPowerCutBeforeReset(t *testing.T) {
	b := newBench(t, "")
	_, err := b.d.Read(t.Context())
	require.ErrorIs(t, err, ota.ErrNoBootState)
	b.reset() // there is nothing to begin
	b.write(committed(0))
	b.boot(0)
	b.write(trial)
	for range 2 {
		b.boot(0)
		b.read(trial)
	}
	b.reset()
	b.boot(1)
	b.read(under)
}

// TestPowerCutAfterArm: a trial that was written down as begun and never ran has
// failed.
func TestPowerCutAfterArm(t *testing.T) {
	b := newBench(t, documented)
	b.boot(0)
	b.write(trial)
	arg, err := b.d.Arm(t.Context())
	require.NoError(t, err)
	require.Equal(t, RebootArg, arg)
	require.Equal(t, b.d.Capabilities().RebootArg, arg)
	b.boot(0)
	b.read(under)
	arg, err = b.d.Arm(t.Context())
	require.NoError(t, err)
	require.Empty(t, arg)
}

// TestByHand: somebody restarts with the argument without asking the driver.
func TestByHand(t *testing.T) {
	b := newBench(t, documented)
	b.boot(0)
	b.write(trial)
	require.NoError(t, b.f.WriteFile(register, []byte(RebootArg)))
	b.boot(1)
	b.read(under)
	b.write(under)
	b.boot(0)
	b.read(under)

	b = newBench(t, documented)
	require.NoError(t, b.f.WriteFile(register, []byte(RebootArg)))
	b.boot(1)
	b.read(under)
	// It is committed, and put on trial again in the same boot.
	b.write(committed(1))
	b.read(committed(1))
	b.write(trial)
	b.read(trial)
}

// TestResetFails: no restart, no trial begun.
func TestResetFails(t *testing.T) {
	b := newBench(t, documented)
	b.boot(0)
	b.write(trial)
	stop := errors.New("stop")
	b.d.c.reboot = func(string) error { return stop }
	require.ErrorIs(t, b.d.Reset(t.Context()), stop)
	b.read(trial)
	b.write(committed(0))
	require.ErrorIs(t, b.d.Reset(t.Context()), stop)
}

func TestBad(t *testing.T) {
	for _, p := range [][]int{nil, {1}, {1, 1}, {0, 1}, {1, 256}} {
		_, err := New(&Config{Partitions: p})
		require.ErrorIs(t, err, ota.ErrInvalid)
	}
	b := newBench(t, documented)
	for _, c := range []driver.Choice{
		{Active: 2}, {Active: -1}, {Trial: true, Revert: -1, Tries: 1}, {Trial: true, Tries: 1}, {Active: 1, Revert: 2},
		{Active: 1, Trial: true, Tries: 2}, {Active: 1, Trial: true}, {Active: 1, Trial: true, Booted: true, Tries: 1},
	} {
		require.Error(t, b.d.Write(t.Context(), c), "%+v", c)
	}
	for text, want := range map[string]error{
		"boot_partition=x":       ota.ErrBadBootState,
		"boot_partition=9":       ota.ErrBadBootState,
		"tryboot_a_b=1":          ota.ErrNoBootState,
		strings.Repeat("#", 600): ota.ErrBadBootState,
	} {
		require.NoError(t, b.f.WriteFile(file, []byte(text)))
		_, err := b.d.Read(t.Context())
		require.ErrorIs(t, err, want, "%q", text)
	}
	// What cannot be understood is not replaced.
	require.NoError(t, b.f.WriteFile(file, []byte("boot_partition=x")))
	require.ErrorIs(t, b.d.Write(t.Context(), trial), ErrFormat)
	require.ErrorIs(t, b.d.Reset(t.Context()), ErrFormat)
	for p, content := range map[string]string{"partition": "\x00\x00\x00\x09", "tryboot": "\x00"} {
		require.NoError(t, b.f.WriteFile(path.Join("/dt/chosen/bootloader", p), []byte(content)))
		_, err := b.d.Running(t.Context())
		require.ErrorIs(t, err, ota.ErrUnknownSlot)
	}
	require.NoError(t, b.f.WriteFile(file, []byte(documented)))
	_, err := b.d.Read(t.Context())
	require.ErrorIs(t, err, ota.ErrUnsupported)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = b.d.Read(ctx)
	require.ErrorIs(t, err, context.Canceled)
}

// TestFiles: the same in a directory.
func TestFiles(t *testing.T) {
	dir := filepath.ToSlash(t.TempDir())
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "dt/chosen/bootloader"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "dt/chosen/bootloader/partition"), []byte{0, 0, 0, 3}, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "boot_id"), []byte("0f0e-1\n"), 0o600))
	d, err := New(&Config{Partitions: []int{2, 3}, File: dir + "/autoboot.txt", DeviceTree: dir + "/dt", BootID: dir + "/boot_id"})
	require.NoError(t, err)
	id, err := d.Running(t.Context())
	require.NoError(t, err)
	require.Equal(t, ota.SlotID(1), id)
	require.NoError(t, d.Write(t.Context(), trial))
	b, err := os.ReadFile(filepath.Join(dir, "autoboot.txt"))
	require.NoError(t, err)
	require.Equal(t, documented+"#ota trial pending 0f0e1\n", string(b))
}

func FuzzAutoboot(f *testing.F) {
	f.Add([]byte(documented))
	f.Add([]byte("x=1\n[none]\n#ota trial begun\n[all]\nboot_partition=0x7"))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := ParseAutoboot(b)
		if err != nil {
			require.ErrorIs(t, err, ErrFormat)
			return
		}
		c, err := a.Bytes()
		if err != nil {
			require.ErrorIs(t, err, ota.ErrTooLarge)
			return
		}
		again, err := ParseAutoboot(c)
		require.NoError(t, err)
		require.Equal(t, a.Partition, again.Partition)
		require.Equal(t, a.Tryboot, again.Tryboot)
		require.Equal(t, a.AB, again.AB)
		require.Equal(t, a.trial, again.trial)
	})
}
