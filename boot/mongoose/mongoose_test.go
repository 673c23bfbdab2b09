package mongoose

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/loadertest"
)

var (
	long   = flag.Bool("crash.long", false, "cut the power twice as well")
	replay = flag.String("crash.replay", "", "repeat the run of this text")
)

func zero(context.Context) (ota.SlotID, error) { return 0, nil }

type vector struct {
	Name   string
	Kind   string
	Record []byte `json:"record_b64"`
	Valid  bool
	Fields struct {
		Seq, Version, Flags uint32
		NumSlots            uint8 `json:"num_slots"`
		Active              int8  `json:"active_slot"`
		Revert              int8  `json:"revert_slot"`
		Slots               []struct {
			Flags    uint32
			AppDev   string `json:"app_dev"`
			MapAddr  uint32 `json:"app_map_addr"`
			FSDev    string `json:"fs_dev"`
			AppLen   uint32 `json:"app_len"`
			AppOrg   uint32 `json:"app_org"`
			AppCRC32 uint32 `json:"app_crc32"`
			AppFlags uint32 `json:"app_flags"`
			ErrCount uint8  `json:"err_count"`
		}
	}
	Bcfg0  []byte `json:"bcfg0_b64"`
	Bcfg1  []byte `json:"bcfg1_b64"`
	Newest *struct {
		Device string
		Offset int
		Seq    uint32
	}
	Before []byte `json:"before_b64"`
	After  []byte `json:"after_b64"`
	Boots  int    `json:"boots_rom"`
}

func vectors(t testing.TB, kind string) (vs []vector) {
	b, err := os.ReadFile("testdata/bootrecords.json")
	require.NoError(t, err)
	var f struct{ Cases []vector }
	require.NoError(t, json.Unmarshal(b, &f))
	for _, v := range f.Cases {
		if v.Kind == kind {
			vs = append(vs, v)
		}
	}
	require.NotEmpty(t, vs)
	return vs
}

// cells returns a flash of n bytes that holds b.
func cells(t testing.TB, cfg memflash.Config, b []byte) ota.Flash {
	chip := memflash.NewChip(cfg)
	f := chip.Flashes()[0]
	if len(b) > 0 && bytes.Count(b, []byte{0xff}) < len(b) {
		end := len(bytes.TrimSuffix(b, bytes.Repeat([]byte{0xff}, len(b)%RecordSize)))
		for end >= RecordSize && bytes.Count(b[end-RecordSize:end], []byte{0xff}) == RecordSize {
			end -= RecordSize
		}
		_, err := f.WriteAt(b[:end], 0)
		require.NoError(t, err)
	}
	return f
}

var nor = memflash.Config{Size: 32 * RecordSize, EraseSize: 32 * RecordSize, WriteSize: 4}

func TestGoldenRecords(t *testing.T) {
	for _, v := range vectors(t, "mos1") {
		r, err := ParseRecord(v.Record)
		if !v.Valid {
			require.ErrorIs(t, err, ErrRecord, v.Name)
			continue
		}
		require.NoError(t, err, v.Name)
		require.Equal(t, v.Record, r.Bytes(), v.Name)
		f := v.Fields
		require.Equal(t, []any{f.Seq, f.Version, f.NumSlots, f.Active, f.Revert, f.Flags}, []any{r.Seq, r.Version, r.NumSlots, r.Active, r.Revert, r.Flags}, v.Name)
		for i, s := range f.Slots {
			got := r.Slots[i]
			require.Equal(t, App{s.AppLen, s.AppOrg, s.AppCRC32, s.AppFlags}, got.App)
			require.Equal(t, []any{s.Flags, s.AppDev, s.MapAddr, s.FSDev, s.ErrCount}, []any{got.Flags, got.AppDev.String(), got.AppMapAddr, got.FSDev.String(), got.ErrCount})
		}
		require.NoError(t, r.check())
		want := driver.Choice{Active: ota.SlotID(f.Active), Revert: ota.NoSlot}
		if f.Flags&1 == 0 {
			want.Trial, want.Revert = true, ota.SlotID(f.Revert)
			want.Booted = f.Flags&4 == 0
			if !want.Booted {
				want.Tries = 1
			}
		}
		require.Equal(t, want, r.choice(), v.Name)
	}
}

func TestGoldenScans(t *testing.T) {
	for _, v := range vectors(t, "mos1-scan") {
		d, err := NewMOS1(&MOS1Config{Devices: [2]ota.Flash{cells(t, nor, v.Bcfg0), cells(t, nor, v.Bcfg1)}, Running: zero})
		require.NoError(t, err)
		f, err := d.scan(t.Context())
		require.NoError(t, err)
		require.Equal(t, v.Newest != nil, f.ok, v.Name)
		if v.Newest == nil {
			_, err := d.Read(t.Context())
			require.ErrorIs(t, err, ota.ErrNoBootState)
			require.ErrorIs(t, d.Write(t.Context(), driver.Choice{Revert: ota.NoSlot}), ota.ErrNoBootState)
			continue
		}
		require.Equal(t, v.Newest.Device, fmt.Sprintf("bcfg%d", f.dev), v.Name)
		require.Equal(t, v.Newest.Seq, f.Seq, v.Name)
		if f.next >= 0 {
			require.Equal(t, v.Newest.Offset, (f.next-1)*RecordSize, v.Name)
		}
		require.Equal(t, v.Name == "mos1/scan-append", f.torn, v.Name)
		// The next record is newer, wherever it goes.
		c := driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}
		if got := f.choice(); got == c {
			c = driver.Choice{Active: 1, Revert: ota.NoSlot}
		}
		require.NoError(t, d.Write(t.Context(), c))
		got, err := d.Read(t.Context())
		require.NoError(t, err)
		require.Equal(t, c, got)
	}
}

// device is the record of a new device: two slots, in place.
func device() *Record {
	r := &Record{Version: 1, NumSlots: 3, Revert: -1, Flags: Committed}
	for i := range r.Slots {
		s := &r.Slots[i]
		copy(s.AppDev[:], fmt.Sprintf("app%d", i))
		copy(s.FSDev[:], fmt.Sprintf("fs%d", i))
		s.Flags, s.AppMapAddr = SlotValid|SlotWriteable, uint32(0x08020000+i<<19)
		s.App = App{Len: 1000, Org: s.AppMapAddr, CRC32: 7}
	}
	for i := range r.Reserved {
		r.Reserved[i] = 0xff
	}
	return r
}

// mos1Loader does what the loader does at a reset.
func mos1Loader(ctx context.Context, fs []ota.Flash) (ota.SlotID, error) {
	d, err := NewMOS1(&MOS1Config{Devices: [2]ota.Flash(fs), Running: zero})
	if err != nil {
		return ota.NoSlot, err
	}
	v, err := d.scan(ctx)
	if err != nil {
		return ota.NoSlot, err
	}
	if !v.ok {
		return ota.NoSlot, errors.New("no record")
	}
	r := v.Record
	switch {
	case r.Flags&Committed != 0:
		return ota.SlotID(r.Active), nil
	case r.Flags&FirstBootB != 0:
		r.Flags &^= FirstBootB
	default:
		r.Active, r.Revert = r.Revert, -1
		r.Flags = r.Flags&^(FirstBootA|MergeFS) | Committed
	}
	r.Seq++
	if v.next >= 0 {
		if err := d.put(v.dev, v.next, &r); err == nil {
			return ota.SlotID(r.Active), nil
		}
	}
	if err := d.erase(1 - v.dev); err != nil {
		return ota.NoSlot, err
	}
	return ota.SlotID(r.Active), d.put(1-v.dev, 0, &r)
}

func mos1Loaders() (ls []loadertest.Loader) {
	for _, k := range []struct {
		name string
		cfg  memflash.Config
		full int // records that are there already
	}{
		{"new", nor, 1},
		{"full", nor, 31},
		{"second", nor, 63},
		{"small", memflash.Config{Size: RecordSize, EraseSize: RecordSize}, 1},
		{"file", memflash.Config{Size: 4096, Unsynced: true}, 2},
	} {
		open := func(fs []ota.Flash, running func(context.Context) (ota.SlotID, error)) (*MOS1, error) {
			return NewMOS1(&MOS1Config{
				Devices: [2]ota.Flash(fs), Default: device(), MergeFS: true, Running: running,
				App: func(_ context.Context, id ota.SlotID) (App, error) {
					return App{Len: 5, Org: device().Slots[id].AppMapAddr, CRC32: 9}, nil
				},
			})
		}
		ls = append(ls, loadertest.Loader{
			Name:    "mos1-" + k.name,
			Flashes: []memflash.Config{k.cfg, k.cfg},
			Format: func(fs []ota.Flash) error {
				d, err := open(fs, zero)
				for i := 0; i < k.full && err == nil; i++ {
					v, serr := d.scan(context.Background())
					if serr != nil {
						return serr
					}
					r := device()
					r.Slots[4].ErrCount = byte(i)
					err = d.append(v, *r)
				}
				return err
			},
			Open: func(fs []ota.Flash, running func(context.Context) (ota.SlotID, error)) (driver.Driver, error) {
				if running == nil {
					running = zero
				}
				return open(fs, running)
			},
			Boot: mos1Loader,
			Intact: func(fs []ota.Flash) error {
				d, err := open(fs, zero)
				if err != nil {
					return err
				}
				r, err := d.Record(context.Background())
				if err != nil {
					return err
				}
				for i, s := range device().Slots {
					got := r.Slots[i]
					if got.AppDev != s.AppDev || got.FSDev != s.FSDev || got.Flags != s.Flags || i > 1 && got.App != s.App {
						return fmt.Errorf("slot %d: %+v", i, got)
					}
				}
				return nil
			},
			Weak: true, // one copy of a record
		})
	}
	return ls
}

func TestConformance(t *testing.T) {
	for _, l := range append(mos1Loaders(), rbootLoaders()...) {
		t.Run(l.Name, l.Conformance)
	}
}

func TestPowerCuts(t *testing.T) {
	for _, l := range append(mos1Loaders(), rbootLoaders()...) {
		l.Replay, l.Twice = *replay, *long
		l.PowerCuts(t)
	}
}

func TestMOS1(t *testing.T) {
	ctx := t.Context()
	chip := memflash.NewChip(nor, nor)
	open := func() *MOS1 {
		d, err := NewMOS1(&MOS1Config{Devices: [2]ota.Flash(chip.Flashes()), Default: device(), Running: zero})
		require.NoError(t, err)
		return d
	}
	d := open()
	trial := driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}
	for i := range 100 {
		require.NoError(t, d.Write(ctx, trial))
		require.NoError(t, d.Write(ctx, trial))
		c, err := open().Read(ctx)
		require.NoError(t, err)
		require.Equal(t, trial, c)
		id, err := mos1Loader(ctx, chip.Flashes())
		require.NoError(t, err)
		require.Equal(t, ota.SlotID(1), id)
		r, err := d.Record(ctx)
		require.NoError(t, err)
		require.Equal(t, uint32(2+3*i), r.Seq)
		require.NoError(t, d.Write(ctx, driver.Choice{Active: ota.SlotID(i % 2), Revert: ota.NoSlot}))
	}
	require.LessOrEqual(t, chip.Wear(0)[0], 6)
	require.LessOrEqual(t, chip.Wear(1)[0], 6)
	require.NoError(t, chip.Err())

	for _, c := range []driver.Choice{{Active: 3}, {Active: -1}, {Active: 1, Trial: true, Revert: 1}, {Active: 1, Trial: true, Revert: ota.NoSlot}} {
		require.ErrorIs(t, d.Write(ctx, c), ota.ErrUnknownSlot)
	}
	require.ErrorIs(t, d.Write(ctx, driver.Choice{Active: 1, Trial: true, Tries: 2}), ota.ErrInvalid)
	stop := errors.New("stop")
	d.c.App = func(context.Context, ota.SlotID) (App, error) { return App{}, stop }
	require.ErrorIs(t, d.Write(ctx, trial), stop)
	d.c.App = func(context.Context, ota.SlotID) (App, error) { return App{Org: 1}, nil }
	require.ErrorIs(t, d.Write(ctx, trial), ota.ErrUnsupported)

	// Records that the loader cannot act on.
	for _, r := range []Record{{Version: 2, NumSlots: 2}, {Version: 1, NumSlots: 6}, {Version: 1, NumSlots: 2, Active: 2}, {Version: 1, NumSlots: 2, Revert: -2}, {Version: 1}} {
		d, err := NewMOS1(&MOS1Config{Devices: [2]ota.Flash{cells(t, nor, r.Bytes()), cells(t, nor, nil)}, Default: device(), Running: zero})
		require.NoError(t, err)
		_, err = d.Read(ctx)
		require.ErrorIs(t, err, ota.ErrBadBootState)
		require.ErrorIs(t, d.Write(ctx, trial), ErrRecord)
	}
	last := device()
	last.Seq = 0xfffffffe
	d, err := NewMOS1(&MOS1Config{Devices: [2]ota.Flash{cells(t, nor, last.Bytes()), cells(t, nor, nil)}, Running: zero})
	require.NoError(t, err)
	require.ErrorIs(t, d.Write(ctx, trial), ota.ErrBadBootState)
	junk := []byte(strings.Repeat("junk", 64))
	d, err = NewMOS1(&MOS1Config{Devices: [2]ota.Flash{cells(t, nor, junk), cells(t, nor, junk)}, Running: zero})
	require.NoError(t, err)
	_, err = d.Read(ctx)
	require.ErrorIs(t, err, ota.ErrBadBootState)
	require.ErrorIs(t, d.Write(ctx, trial), ota.ErrBadBootState)

	f := memflash.New(nor)
	for _, c := range []*MOS1Config{nil, {}, {Devices: [2]ota.Flash{f, f}}, {Devices: [2]ota.Flash{f, memflash.New(memflash.Config{Size: 100})}, Running: zero},
		{Devices: [2]ota.Flash{f, f}, Running: zero, Default: &Record{}}} {
		_, err := NewMOS1(c)
		require.ErrorIs(t, err, ota.ErrInvalid)
	}
}

// start does what rBoot does with its configuration at a reset.
func start(c *RBootConfig) (rom uint8, changed bool) {
	old := *c
	switch {
	case c.Current >= c.Count:
		c.Current, c.Updated, c.FirstBoot = 0, 0, 0
	case c.FirstBoot != 0 && c.Attempts == 0:
		c.Attempts = 1
	case c.FirstBoot != 0:
		c.Current, c.Updated, c.Attempts = c.Previous, 0, 0
	}
	return c.Current, *c != old
}

// built is what a loader was built to start from.
func built() *RBootConfig {
	return &RBootConfig{Count: 2, ROMs: [4]uint32{0x8000, 0x108000}, ROMSizes: [4]uint32{0xf0000, 0xf0000}, FS: [4]uint32{1, 2}, FSSizes: [4]uint32{3, 4}, UserFlags: 0x80}
}

func TestGoldenRBoot(t *testing.T) {
	for _, v := range vectors(t, "rboot-boot") {
		c, err := ParseRBoot(v.Before, false)
		if v.Name == "rboot/erased" {
			require.ErrorIs(t, err, ErrRecord)
			c = *built()
			rom, _ := start(&c)
			require.Equal(t, v.Boots, int(rom))
			continue
		}
		require.NoError(t, err, v.Name)
		require.Equal(t, v.Before, c.Bytes(false), v.Name)
		sum := c.Bytes(true)
		again, err := ParseRBoot(sum, true)
		require.NoError(t, err)
		require.Equal(t, c, again)
		sum[3] ^= 1
		_, err = ParseRBoot(sum, true)
		require.ErrorIs(t, err, ErrRecord)

		rom, changed := start(&c)
		require.Equal(t, v.Boots, int(rom), v.Name)
		require.Equal(t, v.After != nil, changed, v.Name)
		if changed {
			require.Equal(t, v.After, c.Bytes(false), v.Name)
		}
	}
	// What the driver says about them.
	for name, want := range map[string]driver.Choice{
		"rboot/committed":       {Active: 0, Revert: ota.NoSlot},
		"rboot/first-boot":      {Active: 1, Trial: true, Revert: 0, Tries: 1},
		"rboot/second-boot":     {Active: 1, Trial: true, Revert: 0, Booted: true},
		"rboot/after-rollback":  {Active: 0, Revert: ota.NoSlot, Worn: true},
		"rboot/bad-current-rom": {Active: 0, Revert: ota.NoSlot, Worn: true},
	} {
		for _, v := range vectors(t, "rboot-boot") {
			if v.Name != name {
				continue
			}
			f := memflash.New(memflash.Config{Size: 4096, EraseSize: 4096, WriteSize: 4})
			_, err := f.WriteAt(v.Before, 0)
			require.NoError(t, err)
			d, err := NewRBoot(&RBootOptions{Sector: f, AllowSingle: true, Running: zero})
			require.NoError(t, err)
			c, err := d.Read(t.Context())
			require.NoError(t, err)
			require.Equal(t, want, c, name)
			if c.Worn {
				require.NoError(t, d.Write(t.Context(), driver.Choice{Active: 0, Revert: ota.NoSlot}))
				cfg, err := d.Config(t.Context())
				require.NoError(t, err)
				_, changed := start(&cfg)
				require.False(t, changed, "the loader writes at every boot")
			}
		}
	}
}

func rbootLoaders() (ls []loadertest.Loader) {
	for _, k := range []struct {
		name     string
		cfg      memflash.Config
		checksum bool
	}{
		{"nor", memflash.Config{Size: 4096, EraseSize: 4096, WriteSize: 4}, false},
		{"checksum", memflash.Config{Size: 4096, EraseSize: 4096, WriteSize: 4}, true},
		{"file", memflash.Config{Size: 4096, Unsynced: true}, true},
	} {
		open := func(fs []ota.Flash, running func(context.Context) (ota.SlotID, error)) (*RBoot, error) {
			return NewRBoot(&RBootOptions{Sector: fs[0], Checksum: k.checksum, Default: built(), AllowSingle: true, MergeFS: true, Running: running})
		}
		ls = append(ls, loadertest.Loader{
			Name:    "rboot-" + k.name,
			Flashes: []memflash.Config{k.cfg},
			Open: func(fs []ota.Flash, running func(context.Context) (ota.SlotID, error)) (driver.Driver, error) {
				if running == nil {
					running = zero
				}
				return open(fs, running)
			},
			Boot: func(ctx context.Context, fs []ota.Flash) (ota.SlotID, error) {
				d, err := open(fs, zero)
				if err != nil {
					return ota.NoSlot, err
				}
				c, err := d.Config(ctx)
				if err != nil {
					return ota.NoSlot, err
				}
				rom, changed := start(&c)
				if changed {
					err = d.put(c.Bytes(k.checksum))
				}
				return ota.SlotID(rom), err
			},
			Intact: func(fs []ota.Flash) error {
				d, err := open(fs, zero)
				if err != nil {
					return err
				}
				c, err := d.Config(context.Background())
				if b := built(); err == nil && (c.ROMs != b.ROMs || c.FSSizes != b.FSSizes || c.UserFlags&0x80 == 0) {
					err = fmt.Errorf("configuration %+v", c)
				}
				return err
			},
			Weak: true, // one copy
		})
	}
	return ls
}

func TestRBoot(t *testing.T) {
	ctx := t.Context()
	f := memflash.New(memflash.Config{Size: 4096, EraseSize: 4096, WriteSize: 4})
	d, err := NewRBoot(&RBootOptions{Sector: f, Running: zero})
	require.NoError(t, err)
	_, err = d.Read(ctx)
	require.ErrorIs(t, err, ota.ErrNoBootState)
	trial := driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}
	require.ErrorIs(t, d.Write(ctx, trial), ota.ErrNoBootState)
	d.o.Default = built()
	require.ErrorIs(t, d.Write(ctx, trial), ErrSingle)
	d.o.AllowSingle = true
	require.NoError(t, d.Write(ctx, trial))
	d.o.AllowSingle = false
	require.NoError(t, d.Write(ctx, trial)) // there is nothing to do
	for _, c := range []driver.Choice{{Active: 2}, {Active: 1, Trial: true, Revert: 1}, {Active: 1, Trial: true, Revert: 2}} {
		require.ErrorIs(t, d.Write(ctx, c), ota.ErrUnknownSlot)
	}
	require.ErrorIs(t, d.Write(ctx, driver.Choice{Active: 1, Trial: true, Tries: 2}), ota.ErrInvalid)
	c := *built()
	for _, n := range []uint8{0, 5} {
		c.Count = n
		f := memflash.New(memflash.Config{Size: 4096})
		_, err := f.WriteAt(c.Bytes(false), 0)
		require.NoError(t, err)
		d, err := NewRBoot(&RBootOptions{Sector: f, Running: zero})
		require.NoError(t, err)
		_, err = d.Read(ctx)
		require.ErrorIs(t, err, ota.ErrBadBootState)
		require.ErrorIs(t, d.Write(ctx, trial), ota.ErrBadBootState)
		d.o.Default, d.o.AllowSingle = built(), true
		require.NoError(t, d.Write(ctx, trial))
		got, err := d.Read(ctx)
		require.NoError(t, err)
		require.Equal(t, trial, got)
	}
	for _, o := range []*RBootOptions{nil, {}, {Sector: f}, {Sector: memflash.New(memflash.Config{Size: 80}), Running: zero}} {
		_, err := NewRBoot(o)
		require.ErrorIs(t, err, ota.ErrInvalid)
	}
}

func FuzzRecord(f *testing.F) {
	for _, v := range vectors(f, "mos1") {
		f.Add(v.Record)
	}
	f.Add(device().Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRecord(b)
		if err != nil {
			require.ErrorIs(t, err, ErrRecord)
			return
		}
		require.Equal(t, b[:RecordSize], r.Bytes())
		_ = r.check()
	})
}

func FuzzRBoot(f *testing.F) {
	for _, v := range vectors(f, "rboot-boot") {
		f.Add(v.Before, false)
	}
	f.Add(built().Bytes(true), true)
	f.Fuzz(func(t *testing.T, b []byte, checksum bool) {
		c, err := ParseRBoot(b, checksum)
		if err != nil {
			require.ErrorIs(t, err, ErrRecord)
			return
		}
		again := c.Bytes(checksum)
		require.Equal(t, b[:len(again)], again)
	})
}

func ExampleNewMOS1() {
	cfg := memflash.Config{Size: 8192, EraseSize: 8192}
	d, err := NewMOS1(&MOS1Config{
		Devices: [2]ota.Flash{memflash.New(cfg), memflash.New(cfg)},
		Default: device(),
		Running: zero,
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx := context.Background()
	fmt.Println(d.Write(ctx, driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}))
	r, err := d.Record(ctx)
	fmt.Println(r.Active, r.Revert, r.Flags == FirstBootA|FirstBootB, err)
	// Output:
	// <nil>
	// 1 0 true <nil>
}
