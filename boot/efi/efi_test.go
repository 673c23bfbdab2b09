package efi_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/efi"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/efisim"
	"github.com/slotota/ota/internal/fsys"
	"github.com/slotota/ota/internal/loadertest"
)

var (
	long   = flag.Bool("crash.long", false, "cut the power twice as well")
	replay = flag.String("crash.replay", "", "repeat the run of this text")
)

const (
	bootOrder   = "BootOrder-" + efi.Global
	bootNext    = "BootNext-" + efi.Global
	bootCurrent = "BootCurrent-" + efi.Global
)

var part = efi.HardDrive{Number: 1, Start: 2048, Size: 163840, GUID: efi.GUID{0xaf, 0x3d, 0xc6, 0x0f, 15: 1}}

func slots() []efi.Slot {
	return []efi.Slot{
		{Description: "Acme A", Partition: part, File: "/a/vmlinuz", Cmdline: `initrd=\a\initrd ota.slot=A`},
		{Description: "Acme B", Partition: part, File: `\b\vmlinuz`},
	}
}

func u16(ns ...uint16) (b []byte) {
	for _, n := range ns {
		b = binary.LittleEndian.AppendUint16(b, n)
	}
	return b
}

// foreign are options of others, which nobody may change: the setup program, a
// disk, and one that no firmware understands.
func foreign(t testing.TB) map[string][]byte {
	usb, err := (&efi.LoadOption{Attributes: 1, Description: "USB Stück", Path: []efi.Node{{Type: 2, SubType: 1, Data: []byte{1, 2}}}}).Bytes()
	require.NoError(t, err)
	return map[string][]byte{
		"Boot0000-" + efi.Global: usb,
		"Boot0003-" + efi.Global: {1, 2, 3},
		"Lang-" + efi.Global:     []byte("eng"),
	}
}

// vars are the variables of a machine.
func vars(t testing.TB, v efi.Vars) efi.Vars {
	for name, b := range foreign(t) {
		require.NoError(t, v.Set(name, 7, b))
	}
	require.NoError(t, v.Set(bootOrder, 7, u16(0, 3)))
	return v
}

// firmware does what UEFI does at a reset, and returns the description of the
// option that it starts; "" if it is none of a slot. unloadable options are passed
// over.
func firmware(v efi.Vars, unloadable ...string) (string, error) {
	start := func(n uint16) (string, bool, error) {
		_, b, err := v.Get(fmt.Sprintf("Boot%04X-%s", n, efi.Global))
		if err != nil {
			return "", false, ignore(err)
		}
		o, err := efi.ParseLoadOption(b)
		if err != nil || o.Attributes&efi.Active == 0 || slices.Contains(unloadable, o.Description) || strings.HasPrefix(o.Description, "USB") {
			return "", false, nil
		}
		return o.Description, true, v.Set(bootCurrent, 6, u16(n))
	}
	var order []uint16
	if _, b, err := v.Get(bootNext); err == nil {
		if err := v.Delete(bootNext); err != nil {
			return "", err
		}
		order = append(order, binary.LittleEndian.Uint16(b))
	} else if ignore(err) != nil {
		return "", err
	}
	_, b, err := v.Get(bootOrder)
	if ignore(err) != nil {
		return "", err
	}
	for ; len(b) >= 2; b = b[2:] {
		order = append(order, binary.LittleEndian.Uint16(b))
	}
	for _, n := range order {
		if d, ok, err := start(n); ok || err != nil {
			return d, err
		}
	}
	return "", nil
}

func ignore(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func sim(flashes []ota.Flash, reset bool) (efi.Vars, error) {
	s, err := fsys.NewSim(flashes, reset)
	return efisim.Vars{FS: s, Dir: "/vars"}, err
}

func loader(t *testing.T) *loadertest.Loader {
	others := foreign(t)
	return &loadertest.Loader{
		Name:    "efi",
		Flashes: []memflash.Config{{Size: fsys.SimSize}, {Size: fsys.SimSize}},
		Format: func(flashes []ota.Flash) error {
			v, err := sim(flashes, true)
			if err == nil {
				vars(t, v)
			}
			return err
		},
		Open: func(flashes []ota.Flash, running func(context.Context) (ota.SlotID, error)) (driver.Driver, error) {
			v, err := sim(flashes, false)
			if err != nil {
				return nil, err
			}
			return efi.New(&efi.Config{Slots: slots(), Vars: v, Running: running})
		},
		Boot: func(_ context.Context, flashes []ota.Flash) (ota.SlotID, error) {
			v, err := sim(flashes, true)
			if err != nil {
				return ota.NoSlot, err
			}
			d, err := firmware(v)
			if d == "Acme B" {
				return 1, err
			}
			return 0, err // the fallback is a copy of slot 0
		},
		Intact: func(flashes []ota.Flash) error {
			v, err := sim(flashes, false)
			if err != nil {
				return err
			}
			for name, want := range others {
				if _, b, err := v.Get(name); err != nil || !bytes.Equal(b, want) {
					return fmt.Errorf("variable %s is %x (%v)", name, b, err)
				}
			}
			_, b, err := v.Get(bootOrder)
			if err != nil || len(b) != 6 || !bytes.Equal(b[2:], u16(0, 3)) {
				return fmt.Errorf("BootOrder is %x (%v)", b, err)
			}
			return nil
		},
		Replay: *replay, Twice: *long,
	}
}

func TestConformance(t *testing.T) { loader(t).Conformance(t) }

func TestPowerCuts(t *testing.T) { loader(t).PowerCuts(t) }

func TestTransitions(t *testing.T) { loader(t).Transitions(t) }

// mem returns variables without faults.
func mem(t testing.TB) efi.Vars {
	v, err := sim(memflash.NewChip(memflash.Config{Size: fsys.SimSize}, memflash.Config{Size: fsys.SimSize}).Flashes(), true)
	require.NoError(t, err)
	return vars(t, v)
}

func open(t testing.TB, v efi.Vars) *efi.Driver {
	d, err := efi.New(&efi.Config{Slots: slots(), Vars: v})
	require.NoError(t, err)
	return d
}

// TestLife takes a device through installs that fail in each way, and one that is
// committed, with the firmware in between.
func TestLife(t *testing.T) {
	ctx := t.Context()
	v := mem(t)
	d := open(t, v)
	_, err := d.Read(ctx)
	require.ErrorIs(t, err, ota.ErrNoBootState)
	_, err = d.Running(ctx)
	require.ErrorIs(t, err, ota.ErrUnknownSlot)
	require.NoError(t, d.Write(ctx, driver.Choice{Active: 0, Revert: ota.NoSlot}))

	boot := func(want ota.SlotID, unloadable ...string) {
		t.Helper()
		name, err := firmware(v, unloadable...)
		require.NoError(t, err)
		d = open(t, v)
		got, err := d.Running(ctx)
		require.NoError(t, err)
		require.Equal(t, want, got, name)
	}
	read := func(want driver.Choice) {
		t.Helper()
		c, err := d.Read(ctx)
		require.NoError(t, err)
		require.Equal(t, want, c)
	}
	committed := func(id ota.SlotID) driver.Choice { return driver.Choice{Active: id, Revert: ota.NoSlot} }
	trial := driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}

	boot(0)
	read(committed(0))
	// A trial that is not committed.
	require.NoError(t, d.Write(ctx, trial))
	read(trial)
	boot(1)
	read(committed(0))
	boot(0)
	// One that cannot be loaded.
	require.NoError(t, d.Write(ctx, trial))
	boot(0, "Acme B")
	read(committed(0))
	// One that is called off.
	require.NoError(t, d.Write(ctx, trial))
	require.NoError(t, d.Write(ctx, committed(0)))
	boot(0)
	// One that is committed.
	require.NoError(t, d.Write(ctx, trial))
	boot(1)
	require.NoError(t, d.Write(ctx, committed(1)))
	read(committed(1))
	boot(1)
	// The running one on trial again, the other one to go back to.
	require.NoError(t, d.Write(ctx, driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}))
	boot(1)
	boot(0)
	_, b, err := v.Get(bootOrder)
	require.NoError(t, err)
	require.Equal(t, u16(1, 0, 3), b)
}

// TestOptions: what is made is what was asked for, found again wherever the firmware
// moves it, and brought up to date for a trial only.
func TestOptions(t *testing.T) {
	ctx := t.Context()
	v := mem(t)
	require.NoError(t, open(t, v).Write(ctx, driver.Choice{Active: 0, Revert: ota.NoSlot}))
	_, b, err := v.Get("Boot0001-" + efi.Global)
	require.NoError(t, err)
	o, err := efi.ParseLoadOption(b)
	require.NoError(t, err)
	require.Equal(t, "Acme A", o.Description)
	require.Equal(t, uint32(efi.Active), o.Attributes)
	require.Equal(t, `HD(1,GPT,0fc63daf-0000-0000-0000-000000000001,0x800,0x28000)/File(\a\vmlinuz)`, o.Path[0].String()+"/"+o.Path[1].String())
	require.Equal(t, `initrd=\a\initrd ota.slot=A`, efi.DecodeString(o.Optional))
	h, ok := o.Path[0].HardDrive()
	require.True(t, ok)
	require.Equal(t, part, h)

	// The firmware renumbers and reorders.
	require.NoError(t, v.Delete("Boot0001-"+efi.Global))
	require.NoError(t, v.Set("Boot00AF-"+efi.Global, 7, b))
	require.NoError(t, v.Set(bootOrder, 7, u16(3, 0x77, 0xaf, 0)))
	c, err := open(t, v).Read(ctx)
	require.NoError(t, err)
	require.Equal(t, driver.Choice{Active: 0, Revert: ota.NoSlot}, c)

	// Another command line takes effect with the next trial only.
	s := slots()
	s[0].Cmdline, s[1].Cmdline = "new", "new"
	d, err := efi.New(&efi.Config{Slots: s, Vars: v})
	require.NoError(t, err)
	require.NoError(t, d.Write(ctx, driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}))
	_, same, err := v.Get("Boot00AF-" + efi.Global)
	require.NoError(t, err)
	require.Equal(t, b, same)
	_, next, err := v.Get(bootNext)
	require.NoError(t, err)
	require.Equal(t, u16(1), next)
	require.NoError(t, d.Write(ctx, driver.Choice{Active: 1, Revert: ota.NoSlot}))
	require.NoError(t, d.Write(ctx, driver.Choice{Active: 0, Trial: true, Revert: 1, Tries: 1}))
	_, changed, err := v.Get("Boot00AF-" + efi.Global)
	require.NoError(t, err)
	require.NotEqual(t, b, changed)
	_, order, err := v.Get(bootOrder)
	require.NoError(t, err)
	require.Equal(t, u16(3, 0x77, 1, 0), order)

	// An option that is switched off is not started.
	require.NoError(t, d.Write(ctx, driver.Choice{Active: 1, Revert: ota.NoSlot}))
	_, b, err = v.Get("Boot0001-" + efi.Global)
	require.NoError(t, err)
	b[0] = 0
	require.NoError(t, v.Set("Boot0001-"+efi.Global, 7, b))
	_, err = d.Read(ctx)
	require.ErrorIs(t, err, ota.ErrNoBootState)
	require.NoError(t, d.Write(ctx, driver.Choice{Active: 1, Revert: ota.NoSlot}))
	_, err = d.Read(ctx)
	require.NoError(t, err)

	// A BootNext of somebody else is theirs.
	require.NoError(t, v.Set(bootNext, 7, u16(0)))
	require.NoError(t, d.Write(ctx, driver.Choice{Active: 0, Revert: ota.NoSlot}))
	_, next, err = v.Get(bootNext)
	require.NoError(t, err)
	require.Equal(t, u16(0), next)
}

// TestExisting: options without a file are used and never made.
func TestExisting(t *testing.T) {
	ctx := t.Context()
	v := mem(t)
	d, err := efi.New(&efi.Config{Slots: []efi.Slot{{Description: "A"}, {Description: "B"}}, Vars: v})
	require.NoError(t, err)
	require.ErrorIs(t, d.Write(ctx, driver.Choice{Active: 0, Revert: ota.NoSlot}), ota.ErrInvalid)
	o := &efi.LoadOption{Attributes: 1, Description: "A"}
	b, err := o.Bytes()
	require.NoError(t, err)
	require.NoError(t, v.Set("Boot0010-"+efi.Global, 7, b))
	require.NoError(t, d.Write(ctx, driver.Choice{Active: 0, Revert: ota.NoSlot}))
	_, order, err := v.Get(bootOrder)
	require.NoError(t, err)
	require.Equal(t, u16(0x10, 0, 3), order)
}

func TestBadConfig(t *testing.T) {
	for _, s := range [][]efi.Slot{
		nil,
		{{Description: "A"}},
		{{Description: "A"}, {Description: "A"}},
		{{Description: "A"}, {Description: ""}},
		{{Description: "A"}, {Description: "B\x00"}},
		{{Description: "A"}, {Description: "B", File: "x"}},
		{{Description: "A"}, {Description: "B", File: strings.Repeat("x", 1<<16), Partition: part}},
	} {
		_, err := efi.New(&efi.Config{Slots: s})
		require.ErrorIs(t, err, ota.ErrInvalid, "%v", len(s))
	}
	d := open(t, mem(t))
	for _, c := range []driver.Choice{
		{Active: 2}, {Active: -1}, {Trial: true, Revert: -1, Tries: 1}, {Trial: true, Revert: 2, Tries: 1}, {Active: 1, Revert: 2},
		{Active: 1, Trial: true, Tries: 2}, {Active: 1, Trial: true},
	} {
		require.Error(t, d.Write(t.Context(), c), "%+v", c)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, d.Write(ctx, driver.Choice{}), context.Canceled)
	_, err := d.Read(ctx)
	require.ErrorIs(t, err, context.Canceled)
	_, err = d.Running(ctx)
	require.ErrorIs(t, err, context.Canceled)
}

// broken are variables of which one cannot be read, or not be written.
type broken struct {
	efi.Vars
	read, write string
}

var errBroken = errors.New("broken")

func (b broken) Get(name string) (uint32, []byte, error) {
	if name == b.read {
		return 0, nil, errBroken
	}
	return b.Vars.Get(name)
}

func (b broken) Set(name string, attrs uint32, data []byte) error {
	if name == b.write {
		return nil // lost
	}
	return b.Vars.Set(name, attrs, data)
}

func (b broken) Delete(name string) error {
	if name == b.write {
		return nil
	}
	return b.Vars.Delete(name)
}

// TestBroken: what cannot be read is not taken for absent, and a write that the
// firmware forgets does not go unnoticed.
func TestBroken(t *testing.T) {
	ctx := t.Context()
	v := mem(t)
	require.NoError(t, open(t, v).Write(ctx, driver.Choice{Active: 0, Revert: ota.NoSlot}))
	for _, name := range []string{bootOrder, bootNext, "Boot0000-" + efi.Global} {
		d := open(t, broken{Vars: v, read: name})
		_, err := d.Read(ctx)
		require.ErrorIs(t, err, errBroken, name)
		require.ErrorIs(t, d.Write(ctx, driver.Choice{Active: 1, Revert: ota.NoSlot}), errBroken, name)
	}
	trial := driver.Choice{Active: 1, Trial: true, Tries: 1}
	for _, name := range []string{"Boot0002-" + efi.Global, bootNext} {
		require.Error(t, open(t, broken{Vars: v, write: name}).Write(ctx, trial), name)
		_, _, err := v.Get(bootNext)
		require.ErrorIs(t, err, fs.ErrNotExist)
	}
	require.NoError(t, open(t, v).Write(ctx, trial))
	require.ErrorIs(t, open(t, broken{Vars: v, write: bootOrder}).Write(ctx, driver.Choice{Active: 1, Revert: ota.NoSlot}), ota.ErrVerify)
	require.ErrorIs(t, open(t, broken{Vars: v, write: bootNext}).Write(ctx, driver.Choice{Active: 0, Revert: ota.NoSlot}), ota.ErrVerify)
	require.NoError(t, v.Set(bootOrder, 7, []byte{1, 2, 3}))
	_, err := open(t, v).Read(ctx)
	require.ErrorIs(t, err, efi.ErrFormat)
}

// TestSame: variables in files and in memory do the same.
func TestSame(t *testing.T) {
	memory, err := sim(memflash.NewChip(memflash.Config{Size: fsys.SimSize}, memflash.Config{Size: fsys.SimSize}).Flashes(), true)
	require.NoError(t, err)
	for name, v := range map[string]efi.Vars{"efivarfs": efi.Efivarfs{Root: t.TempDir()}, "memory": memory} {
		t.Run(name, func(t *testing.T) {
			names, err := v.List()
			require.NoError(t, err)
			require.Empty(t, names)
			_, _, err = v.Get("A-" + efi.Global)
			require.ErrorIs(t, err, fs.ErrNotExist)
			require.ErrorIs(t, v.Delete("A-"+efi.Global), fs.ErrNotExist)
			for _, b := range []string{"one", "thirteen", "2"} {
				require.NoError(t, v.Set("A-"+efi.Global, 7, []byte(b)))
				attrs, got, err := v.Get("A-" + efi.Global)
				require.NoError(t, err)
				require.Equal(t, uint32(7), attrs)
				require.Equal(t, b, string(got))
			}
			names, err = v.List()
			require.NoError(t, err)
			require.Equal(t, []string{"A-" + efi.Global}, names)
			require.NoError(t, efi.DeleteVerified(v, "A-"+efi.Global))
			require.NoError(t, efi.DeleteVerified(v, "A-"+efi.Global))
			names, err = v.List()
			require.NoError(t, err)
			require.Empty(t, names)
		})
	}
}

func TestEfivarfs(t *testing.T) {
	dir := t.TempDir()
	v := efi.Efivarfs{Root: dir}
	for _, bad := range []string{"", "..", "a/b", "/etc/passwd"} {
		_, _, err := v.Get(bad)
		require.Error(t, err, bad)
		require.Error(t, v.Set(bad, 7, []byte{1}), bad)
	}
	require.ErrorIs(t, v.Set("A", 7, nil), ota.ErrInvalid)
	require.NoError(t, v.Set("A", 0x01020304, []byte{5}))
	raw, err := os.ReadFile(filepath.Join(dir, "A"))
	require.NoError(t, err)
	require.Equal(t, "0403020105", hex.EncodeToString(raw))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "empty"), nil, 0o600))
	_, _, err = v.Get("empty")
	require.ErrorIs(t, err, fs.ErrNotExist)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "short"), []byte{1}, 0o600))
	_, _, err = v.Get("short")
	require.ErrorIs(t, err, efi.ErrFormat)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "long"), make([]byte, efi.MaxVar+1), 0o600))
	_, _, err = v.Get("long")
	require.ErrorIs(t, err, ota.ErrTooLarge)
	_, err = efi.Efivarfs{Root: filepath.Join(dir, "no")}.List()
	require.ErrorIs(t, err, fs.ErrNotExist)
}

func TestGUID(t *testing.T) {
	const text = "0fc63daf-8483-4772-8e79-3d69d8477de4" // Linux file system data
	g, err := efi.ParseGUID(text)
	require.NoError(t, err)
	require.Equal(t, "af3dc60f838472478e793d69d8477de4", hex.EncodeToString(g[:]))
	require.Equal(t, text, g.String())
	h, err := efi.ParseGUID(strings.ToUpper(text))
	require.NoError(t, err)
	require.Equal(t, g, h)
	for _, bad := range []string{"", text[1:], text + "0", strings.ReplaceAll(text, "-", ""), "x" + text[1:], "0fc63da-f8483-4772-8e79-3d69d8477de4"} {
		_, err := efi.ParseGUID(bad)
		require.ErrorIs(t, err, ota.ErrInvalid, "%q", bad)
	}
}

// gpt returns the start of a disk with one partition, number 2.
func gpt(block int64, entries uint32) []byte {
	le := binary.LittleEndian
	table := make([]byte, entries*128)
	e := table[128:]
	copy(e, "typetypetypetype")
	copy(e[16:], part.GUID[:])
	le.PutUint64(e[32:], part.Start)
	le.PutUint64(e[40:], part.Start+part.Size-1)
	h := make([]byte, 92)
	copy(h, "EFI PART\x00\x00\x01\x00")
	le.PutUint32(h[12:], 92)
	le.PutUint64(h[72:], 2)
	le.PutUint32(h[80:], entries)
	le.PutUint32(h[84:], 128)
	le.PutUint32(h[88:], crc32.ChecksumIEEE(table))
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h))
	disk := make([]byte, 2*block+int64(len(table)))
	copy(disk[block:], h)
	copy(disk[2*block:], table)
	return disk
}

func TestPartition(t *testing.T) {
	want := part
	want.Number = 2
	for _, block := range []int64{512, 4096} {
		disk := gpt(block, 128)
		for _, b := range []int64{block, 0} {
			h, err := efi.Partition(bytes.NewReader(disk), b, 2)
			require.NoError(t, err)
			require.Equal(t, want, h)
		}
		for _, n := range []uint32{0, 1, 3, 129} {
			_, err := efi.Partition(bytes.NewReader(disk), block, n)
			require.ErrorIs(t, err, efi.ErrFormat)
		}
		for _, at := range []int64{block, block + 20, 2*block + 4} {
			bad := slices.Clone(disk)
			bad[at] ^= 1
			_, err := efi.Partition(bytes.NewReader(bad), 0, 2)
			require.Error(t, err, "%d", at)
		}
	}
	_, err := efi.Partition(bytes.NewReader(nil), 0, 1)
	require.Error(t, err)
	_, err = efi.Partition(bytes.NewReader(gpt(512, 2000)), 512, 2)
	require.ErrorIs(t, err, efi.ErrFormat)
}

// golden is a load option put together by hand from the specification, with the
// shape of one that OVMF has booted.
const golden = "01000000" + "4600" + "4f0054004100" + "2d00420000" + "00" +
	"04012a00" + "01000000" + "0008000000000000" + "0080020000000000" + "af3dc60f838472478e793d69d8477de4" + "0202" +
	"04041800" + "5c0062005c0076006d006c0069006e00750000" + "00" + "7fff0400" +
	"710075006900650074000000"

func TestGolden(t *testing.T) {
	b, err := hex.DecodeString(golden)
	require.NoError(t, err)
	o, err := efi.ParseLoadOption(b)
	require.NoError(t, err)
	require.Equal(t, "OTA-B", o.Description)
	require.Len(t, o.Path, 2)
	h, ok := o.Path[0].HardDrive()
	require.True(t, ok)
	require.Equal(t, "0fc63daf-8483-4772-8e79-3d69d8477de4", h.GUID.String())
	require.Equal(t, uint64(163840), h.Size)
	name, ok := o.Path[1].File()
	require.True(t, ok)
	require.Equal(t, `\b\vmlinu`, name)
	require.Equal(t, "quiet", efi.DecodeString(o.Optional))
	again, err := o.Bytes()
	require.NoError(t, err)
	require.Equal(t, b, again)
	require.Equal(t, h.Node(), o.Path[0])
	require.Equal(t, efi.FileNode("/b/vmlinu"), o.Path[1])
	for n := range len(b) - 12 {
		_, err := efi.ParseLoadOption(b[:n])
		require.ErrorIs(t, err, efi.ErrFormat, "%d", n)
	}
}

// TestRandomOptions: any option survives.
func TestRandomOptions(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	for range 300 {
		o := &efi.LoadOption{Attributes: rnd.Uint32(), Description: strings.Repeat("ä€😀x", rnd.IntN(5))}
		for range rnd.IntN(4) {
			n := efi.Node{Type: byte(rnd.IntN(5)), SubType: byte(rnd.IntN(256)), Data: make([]byte, rnd.IntN(40))}
			o.Path = append(o.Path, n)
		}
		o.Optional = []byte(strings.Repeat("o", rnd.IntN(9)))
		b, err := o.Bytes()
		require.NoError(t, err)
		p, err := efi.ParseLoadOption(b)
		require.NoError(t, err)
		again, err := p.Bytes()
		require.NoError(t, err)
		require.Equal(t, b, again)
		require.Equal(t, o.Description, p.Description)
		require.Len(t, p.Path, len(o.Path))
	}
}

func FuzzLoadOption(f *testing.F) {
	b, err := hex.DecodeString(golden)
	require.NoError(f, err)
	f.Add(b)
	for _, b := range slices.Collect(maps.Values(foreign(f))) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := efi.ParseLoadOption(b)
		if err != nil {
			require.ErrorIs(t, err, efi.ErrFormat)
			return
		}
		for _, n := range o.Path {
			require.NotEmpty(t, n.String())
		}
		c, err := o.Bytes()
		require.NoError(t, err)
		p, err := efi.ParseLoadOption(c)
		require.NoError(t, err)
		require.Equal(t, o, p)
	})
}

func FuzzPartition(f *testing.F) {
	f.Add(gpt(512, 4), uint32(2))
	f.Fuzz(func(t *testing.T, disk []byte, n uint32) {
		h, err := efi.Partition(bytes.NewReader(disk), 0, n)
		if err == nil {
			require.Equal(t, n, h.Number)
			require.NotZero(t, h.Size)
		}
	})
}
