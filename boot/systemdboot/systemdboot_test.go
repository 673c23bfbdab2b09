package systemdboot

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
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

func TestName(t *testing.T) {
	for file, want := range map[string]Name{
		"a.conf":            {Base: "a", Ext: ".conf"},
		"a+3.efi":           {Base: "a", Ext: ".efi", Counted: true, Left: 3},
		"a+0-2.conf":        {Base: "a", Ext: ".conf", Counted: true, Done: 2},
		"a-1+12-34.conf":    {Base: "a-1", Ext: ".conf", Counted: true, Left: 12, Done: 34},
		"a+1+2-3.conf":      {Base: "a+1", Ext: ".conf", Counted: true, Left: 2, Done: 3},
		"a+.conf":           {Base: "a+", Ext: ".conf"},
		"a+x.conf":          {Base: "a+x", Ext: ".conf"},
		"a+1-.conf":         {Base: "a+1-", Ext: ".conf"},
		"a+-1.conf":         {Base: "a+-1", Ext: ".conf"},
		"a+2147483648.conf": {Base: "a+2147483648", Ext: ".conf"},
		"a+1b.conf":         {Base: "a+1b", Ext: ".conf"},
		"":                  {},
	} {
		n := ParseName(file)
		require.Equal(t, want, n, file)
		require.Equal(t, file, n.String())
	}
	require.Equal(t, "a+1.conf", ParseName("a+1-0.conf").String())
}

// TestVersions: the order in the documentation of the format, oldest first.
func TestVersions(t *testing.T) {
	order := []string{"", "~1", "122.1", "123~rc1-1", "123", "123-a", "123-a.1", "123-1", "123-1.1", "123^post1", "123.a-1", "123.1-1", "123a-1", "124-1"}
	order = slices.DeleteFunc(order, func(s string) bool { return s == "~1" }) // before even the empty one
	for i, a := range order {
		for j, b := range order {
			got := compareVersions(a, b)
			require.Equal(t, compareInts(i, j), got, "%q %q", a, b)
			require.Equal(t, -got, compareVersions(b, a))
		}
	}
	require.Equal(t, -1, compareVersions("~1", ""))
	for _, same := range [][2]string{{"00123", "123"}, {"123_a", "123a"}, {"é1", "1"}, {"1~~x", "1~~x"}, {"~", "~"}, {"1-", "1-"}} {
		require.Zero(t, compareVersions(same[0], same[1]), "%q", same)
	}
	require.Equal(t, 1, compareVersions("acme-b.conf", "acme-a.conf"))
	require.Equal(t, 1, compareVersions("10", "9"))
}

func compareInts(a, b int) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// uki returns the start of a unified kernel image.
func uki(osrelease string) []byte {
	le := binary.LittleEndian
	b := make([]byte, 64+24+16)
	copy(b, "MZ")
	le.PutUint32(b[60:], 64)
	copy(b[64:], "PE\x00\x00")
	le.PutUint16(b[64+6:], 2)
	le.PutUint16(b[64+20:], 16)
	at := uint32(len(b) + 80)
	for _, name := range []string{".text", ".osrel"} {
		s := make([]byte, 40)
		copy(s, name)
		le.PutUint32(s[8:], uint32(len(osrelease)))
		le.PutUint32(s[16:], uint32(len(osrelease)+9))
		le.PutUint32(s[20:], at)
		b = append(b, s...)
	}
	return append(append(b, osrelease...), make([]byte, 20)...)
}

// kind is a way to write the entries of the slots.
type kind struct {
	name  string
	dir   string
	ext   string
	files [2]string
	first int // slot that is sorted first if nothing else tells
}

func conf(version string) string {
	return "# of slot\ntitle \"Acme\"\nsort-key\tacme\nversion " + version + "\nlinux /vmlinuz\noptions quiet\n"
}

func osrel(version string) string {
	return "PRETTY_NAME=\"Acme\"\nIMAGE_ID=acme\nIMAGE_VERSION='" + version + "'\nVERSION_ID=9\n"
}

func kinds() []kind {
	return []kind{
		{"type1-newer", type1Dir, type1Ext, [2]string{conf("1.9"), conf("1.10")}, 1},
		{"type1-older", type1Dir, type1Ext, [2]string{conf("2"), conf("1")}, 0},
		{"type1-names", type1Dir, type1Ext, [2]string{"linux /a\n", "linux /b\n"}, 1},
		{"uki-newer", type2Dir, type2Ext, [2]string{string(uki(osrel("1"))), string(uki(osrel("2")))}, 1},
		{"uki-older", type2Dir, type2Ext, [2]string{string(uki(osrel("2"))), string(uki(osrel("2~rc1")))}, 0},
	}
}

// loaderConf is a file of others.
const loaderConf = "timeout 0\n#default x\n"

// machine writes what a new device has.
func machine(k kind, f fsys.FS, names ...string) error {
	for i, n := range names {
		if err := f.WriteFile(path.Join(k.dir, n+k.ext), []byte(k.files[i])); err != nil {
			return err
		}
	}
	if err := f.WriteFile("/loader/loader.conf", []byte(loaderConf)); err != nil {
		return err
	}
	if err := f.WriteFile(path.Join(k.dir, "README"), []byte("x")); err != nil {
		return err
	}
	return f.SyncDir("/")
}

var counters = regexp.MustCompile(`^(acme-[ab])(?:\+(\d+)(?:-(\d+))?)?(\.conf|\.efi)$`)

// sdboot does what systemd-boot does with the entries of two slots of which k.first
// has the greater version. Its code is not that of the driver.
func sdboot(k kind, f fsys.FS, v efi.Vars) (ota.SlotID, error) {
	names, err := f.ReadDir(k.dir)
	if err != nil {
		return ota.NoSlot, err
	}
	type item struct {
		slot, left, done int
		base, ext        string
		file             string
	}
	var items []item
	for _, n := range names {
		m := counters.FindStringSubmatch(n)
		if m == nil {
			continue
		}
		i := item{slot: int(m[1][5] - 'a'), left: -1, base: m[1], ext: m[4], file: n}
		if m[2] != "" {
			i.left, _ = strconv.Atoi(m[2])
			i.done, _ = strconv.Atoi(m[3])
		}
		items = append(items, i)
	}
	rank := func(i item) int {
		r := 0
		if i.left == 0 {
			r += 2
		}
		if i.slot != k.first {
			r++
		}
		return r
	}
	slices.SortStableFunc(items, func(a, b item) int { return rank(a) - rank(b) })
	if len(items) == 0 {
		return ota.NoSlot, errors.New("no entry")
	}
	pick := items[0]
	get := func(name string) (string, error) {
		_, b, err := v.Get(name)
		if errors.Is(err, fs.ErrNotExist) {
			return "", nil
		}
		return efi.DecodeString(b), err
	}
	once, err := get(varOneShot)
	if err != nil {
		return ota.NoSlot, err
	}
	if once != "" {
		if err := v.Delete(varOneShot); err != nil {
			return ota.NoSlot, err
		}
	}
	always, err := get(varDefault)
	if err != nil {
		return ota.NoSlot, err
	}
	for _, want := range []string{always, once} {
		if i := slices.IndexFunc(items, func(i item) bool { return i.file == want }); i >= 0 {
			pick = items[i]
		}
	}
	if err := v.Set(varSelected, 6, efi.EncodeString(pick.file)); err != nil {
		return ota.NoSlot, err
	}
	if pick.left >= 0 {
		to := fmt.Sprintf("%s+%d-%d%s", pick.base, max(pick.left-1, 0), pick.done+1, pick.ext)
		if err := fsys.Move(f, path.Join(k.dir, pick.file), path.Join(k.dir, to)); err != nil {
			return ota.NoSlot, err
		}
		if err := v.Set(varCountPath, 6, efi.EncodeString(`\loader\entries\`+to)); err != nil {
			return ota.NoSlot, err
		}
	}
	return ota.SlotID(pick.slot), nil
}

var entryNames = []string{"acme-a", "acme-b"}

func loader(k kind, oneShot bool) *loadertest.Loader {
	initial := []string{"acme-a", "acme-b+0"}
	if oneShot {
		initial[1] = "acme-b"
	}
	sim := func(flashes []ota.Flash, reset bool) (fsys.FS, efi.Vars, error) {
		s, err := fsys.NewSim(flashes, reset)
		return s, efisim.Vars{FS: s, Dir: "/vars"}, err
	}
	return &loadertest.Loader{
		Name:    fmt.Sprintf("%s-oneshot-%v", k.name, oneShot),
		Flashes: []memflash.Config{{Size: fsys.SimSize}, {Size: fsys.SimSize}},
		Format: func(flashes []ota.Flash) error {
			f, _, err := sim(flashes, true)
			if err != nil {
				return err
			}
			return machine(k, f, initial...)
		},
		Open: func(flashes []ota.Flash, running func(context.Context) (ota.SlotID, error)) (driver.Driver, error) {
			f, v, err := sim(flashes, false)
			if err != nil {
				return nil, err
			}
			c := &Config{Entries: entryNames, Vars: v, Running: running, files: f}
			if oneShot {
				return NewOneShot(c)
			}
			return New(c)
		},
		Boot: func(_ context.Context, flashes []ota.Flash) (ota.SlotID, error) {
			f, v, err := sim(flashes, true)
			if err != nil {
				return ota.NoSlot, err
			}
			if oneShot {
				// Without a default the first entry is that of slot 0.
				k := k
				k.first = 0
				return sdboot(k, f, v)
			}
			return sdboot(k, f, v)
		},
		Intact: func(flashes []ota.Flash) error {
			f, _, err := sim(flashes, false)
			if err != nil {
				return err
			}
			names, err := f.ReadDir(k.dir)
			if err != nil {
				return err
			}
			for i, base := range entryNames {
				at := slices.IndexFunc(names, func(n string) bool { return strings.HasPrefix(n, base) })
				if at < 0 {
					return fmt.Errorf("entry %s is gone: %q", base, names)
				}
				b, err := f.ReadFile(path.Join(k.dir, names[at]))
				if err != nil || string(b) != k.files[i] {
					return fmt.Errorf("entry %s has changed (%v)", base, err)
				}
			}
			b, err := f.ReadFile("/loader/loader.conf")
			if err != nil || string(b) != loaderConf || len(names) != 3 {
				return fmt.Errorf("files have changed (%v): %q", err, names)
			}
			return nil
		},
		Replay: *replay, Twice: *long,
	}
}

func each(t *testing.T, f func(t *testing.T, l *loadertest.Loader)) {
	for _, k := range kinds() {
		l := loader(k, false)
		t.Run(l.Name, func(t *testing.T) { f(t, l) })
	}
	l := loader(kinds()[1], true)
	t.Run(l.Name, func(t *testing.T) { f(t, l) })
}

func TestConformance(t *testing.T) {
	for _, l := range []*loadertest.Loader{loader(kinds()[1], false), loader(kinds()[0], true)} {
		t.Run(l.Name, l.Conformance)
	}
}

func TestTransitions(t *testing.T) {
	each(t, func(t *testing.T, l *loadertest.Loader) { l.Transitions(t) })
}

func TestPowerCuts(t *testing.T) {
	// The order that takes more renames; TestTransitions has the other ones.
	for _, l := range []*loadertest.Loader{loader(kinds()[1], false), loader(kinds()[0], true)} {
		l.PowerCuts(t)
	}
}

// bench is a machine in a directory.
type bench struct {
	t *testing.T
	k kind
	f fsys.OS
	v efi.Vars
	d driver.Driver
}

func newBench(t *testing.T, k kind, names ...string) *bench {
	dir := t.TempDir()
	for _, d := range []string{type1Dir, type2Dir, "/vars"} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, d), 0o700))
	}
	b := &bench{t: t, k: k, f: fsys.OS{Root: dir}, v: efi.Efivarfs{Root: filepath.Join(dir, "vars")}}
	require.NoError(t, machine(k, b.f, names...))
	d, err := New(&Config{Root: dir, Entries: entryNames, Vars: b.v})
	require.NoError(t, err)
	b.d = d
	return b
}

func (b *bench) names() []string {
	b.t.Helper()
	names, err := b.f.ReadDir(b.k.dir)
	require.NoError(b.t, err)
	return slices.DeleteFunc(names, func(n string) bool { return n == "README" })
}

func (b *bench) boot(want ota.SlotID) {
	b.t.Helper()
	got, err := sdboot(b.k, b.f, b.v)
	require.NoError(b.t, err)
	require.Equal(b.t, want, got, "%q", b.names())
	id, err := b.d.Running(b.t.Context())
	require.NoError(b.t, err)
	require.Equal(b.t, want, id)
}

func (b *bench) read(want driver.Choice) {
	b.t.Helper()
	c, err := b.d.Read(b.t.Context())
	require.NoError(b.t, err)
	require.Equal(b.t, want, c, "%q", b.names())
}

func (b *bench) write(c driver.Choice) {
	b.t.Helper()
	require.NoError(b.t, b.d.Write(b.t.Context(), c))
}

func committed(id ota.SlotID) driver.Choice { return driver.Choice{Active: id, Revert: ota.NoSlot} }

// TestLife takes devices through installs that fail, and one that is committed, with
// the loader in between.
func TestLife(t *testing.T) {
	for _, k := range kinds() {
		t.Run(k.name, func(t *testing.T) {
			b := newBench(t, k, "acme-a", "acme-b+0")
			_, err := b.d.Running(t.Context())
			require.ErrorIs(t, err, ota.ErrUnknownSlot)
			b.read(committed(0))
			b.boot(0)
			// Two boots, never committed.
			trial := driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 2}
			b.write(trial)
			b.read(trial)
			b.boot(1)
			b.read(driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1, Booted: true})
			require.Contains(t, b.names(), "acme-b+1-1"+k.ext)
			b.boot(1)
			b.boot(0)
			// The slot that it went back to may be named bad; it says so.
			c, err := b.d.Read(t.Context())
			require.NoError(t, err)
			require.Equal(t, ota.SlotID(0), c.Active)
			require.False(t, c.Trial)
			require.Equal(t, k.first == 0, c.Worn)
			b.write(committed(0))
			b.read(committed(0))
			require.Contains(t, b.names(), "acme-a"+k.ext)
			// Called off.
			b.write(trial)
			b.write(committed(0))
			b.boot(0)
			// Committed.
			b.write(driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1})
			b.boot(1)
			b.write(committed(1))
			b.read(committed(1))
			require.Contains(t, b.names(), "acme-b"+k.ext)
			require.Contains(t, strings.Join(b.names(), " "), "acme-a+0")
			b.boot(1)
			// Back again, which is an older or a newer version.
			b.write(driver.Choice{Active: 0, Trial: true, Revert: 1, Tries: 1})
			b.boot(0)
			b.boot(1)
		})
	}
}

// TestHalfAnImage: an image that is being written is none.
func TestHalfAnImage(t *testing.T) {
	k := kinds()[3]
	b := newBench(t, k, "acme-a", "acme-b+0")
	p, err := b.d.(*Counting).Path(t.Context(), 1)
	require.NoError(t, err)
	require.Equal(t, "/EFI/Linux/acme-b+0.efi", p)
	whole := uki(osrel("3"))
	for n := 0; n < len(whole)-20; n += 7 {
		require.NoError(t, b.f.WriteFile(p, whole[:n]))
		b.read(committed(0))
		if n < 200 {
			require.ErrorIs(t, b.d.Write(t.Context(), driver.Choice{Active: 1, Trial: true, Tries: 1}), ota.ErrInvalid)
		}
		p2, err := b.d.(*Counting).Path(t.Context(), 1)
		require.NoError(t, err)
		require.Equal(t, p, p2)
	}
	require.NoError(t, b.f.WriteFile(p, whole))
	b.write(driver.Choice{Active: 1, Trial: true, Tries: 1})
	b.boot(1)
}

// TestTwoNames: a rename that a power cut has left half done on FAT.
func TestTwoNames(t *testing.T) {
	b := newBench(t, kinds()[0], "acme-a", "acme-b+1")
	require.NoError(t, b.f.WriteFile(path.Join(type1Dir, "acme-b+0-1.conf"), []byte(b.k.files[1])))
	b.write(committed(1))
	b.read(committed(1))
	require.Equal(t, []string{"acme-a+0.conf", "acme-b+0-1.conf.old", "acme-b.conf"}, b.names())
	b.boot(1)
}

// TestOthers: what stands in the way is found and named.
func TestOthers(t *testing.T) {
	trial := driver.Choice{Active: 1, Trial: true, Tries: 1}
	set := func(b *bench, name, value string) {
		require.NoError(t, b.v.Set(name, 7, efi.EncodeString(value)))
	}
	for name, spoil := range map[string]func(b *bench){
		"default variable": func(b *bench) { set(b, varDefault, "acme-a*") },
		"default in file": func(b *bench) {
			require.NoError(t, b.f.WriteFile("/loader/loader.conf", []byte("default acme-a.conf\n")))
		},
		// A variable that names nothing does not hide what the file says.
		"default in file, behind a variable": func(b *bench) {
			set(b, varDefault, "gone.conf")
			require.NoError(t, b.f.WriteFile("/loader/loader.conf", []byte("default acme-a.conf\n")))
		},
		"default that was started last": func(b *bench) {
			require.NoError(t, b.f.WriteFile("/loader/loader.conf", []byte("default @saved\n")))
		},
		"default variable that was started last": func(b *bench) { set(b, varDefault, "@saved") },
		"entry before": func(b *bench) {
			require.NoError(t, b.f.WriteFile(path.Join(type1Dir, "debian.conf"), []byte("sort-key aaa\nlinux /x\n")))
		},
		"no counting": func(b *bench) { require.NoError(t, b.v.Set(varFeatures, 6, []byte{0x0f, 1, 0, 0, 0, 0, 0, 0})) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, kinds()[0], "acme-a", "acme-b+0")
			spoil(b)
			require.ErrorIs(t, b.d.Write(t.Context(), trial), ota.ErrUnsupported)
			require.Equal(t, []string{"acme-a.conf", "acme-b+0.conf"}, slices.DeleteFunc(b.names(), func(n string) bool { return n == "debian.conf" }))
		})
	}
	b := newBench(t, kinds()[0], "acme-a", "acme-b+0")
	require.NoError(t, b.v.Set(varFeatures, 6, []byte{0xff, 1, 0, 0, 0, 0, 0, 0}))
	// Entries behind those of the slots do no harm, nor do others' variables.
	require.NoError(t, b.f.WriteFile(path.Join(type1Dir, "rescue.conf"), []byte("linux /x\n")))
	require.NoError(t, b.f.WriteFile(path.Join(type1Dir, "auto-x.conf"), []byte("sort-key a\nlinux /x\n")))
	set(b, varOneShot, "auto-reboot-to-firmware-setup")
	b.write(trial)
	b.read(driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1})
	set(b, varOneShot, "acme-a.conf")
	b.read(driver.Choice{Active: 0, Trial: true, Revert: 1, Tries: 1})
	// Between them one would be started instead of the revert slot.
	b = newBench(t, kinds()[1], "acme-a", "acme-b+0")
	require.NoError(t, b.f.WriteFile(path.Join(type1Dir, "rescue.conf"), []byte("linux /x\n")))
	require.ErrorIs(t, b.d.Write(t.Context(), trial), ota.ErrUnsupported)
	b = newBench(t, kinds()[0])
	_, err := b.d.Read(t.Context())
	require.ErrorIs(t, err, ota.ErrNoBootState)
	require.ErrorIs(t, b.d.Write(t.Context(), trial), ota.ErrInvalid)
}

func TestRunning(t *testing.T) {
	b := newBench(t, kinds()[0], "acme-a")
	for name, value := range map[string]string{varCountPath: `\loader\entries\acme-b+1-1.conf`, varSelected: "ACME-B.conf"} {
		require.NoError(t, b.v.Set(name, 6, efi.EncodeString(value)))
		id, err := b.d.Running(t.Context())
		require.NoError(t, err)
		require.Equal(t, ota.SlotID(1), id)
		require.NoError(t, b.v.Delete(name))
	}
	require.NoError(t, b.v.Set(varSelected, 6, efi.EncodeString("debian.conf")))
	_, err := b.d.Running(t.Context())
	require.ErrorIs(t, err, ota.ErrUnknownSlot)
}

// TestOneShotLife is TestLife for the other driver.
func TestOneShotLife(t *testing.T) {
	b := newBench(t, kinds()[1], "acme-a", "acme-b")
	d, err := NewOneShot(&Config{Root: b.f.Root, Entries: entryNames, Vars: b.v})
	require.NoError(t, err)
	b.d = d
	_, err = d.Read(t.Context())
	require.ErrorIs(t, err, ota.ErrNoBootState)
	b.write(committed(0))
	b.read(committed(0))
	trial := driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}
	b.write(trial)
	b.read(trial)
	b.boot(1)
	b.read(committed(0))
	b.boot(0)
	b.write(trial)
	b.write(committed(0))
	b.boot(0)
	b.write(trial)
	b.boot(1)
	b.write(committed(1))
	b.boot(1)
	b.boot(1)
	require.NoError(t, b.v.Set(varFeatures, 6, []byte{0x04}))
	require.ErrorIs(t, b.d.Write(t.Context(), trial), ota.ErrUnsupported)
	require.NoError(t, b.v.Set(varFeatures, 6, []byte{0x0c}))
	require.NoError(t, b.f.Rename(path.Join(type1Dir, "acme-a.conf"), path.Join(type1Dir, "acme-a+1.conf")))
	require.ErrorIs(t, b.d.Write(t.Context(), driver.Choice{Active: 0, Trial: true, Revert: 1, Tries: 1}), ota.ErrInvalid)
}

func TestBadConfig(t *testing.T) {
	for _, names := range [][]string{nil, {"a"}, {"a", "a"}, {"a", ""}, {"a", "ab"}, {"A", "a"}, {"a", "b/c"}, {"a", "b+1"}, {"a", ".b"}, {"a", "auto-b"}} {
		_, err := New(&Config{Entries: names})
		require.ErrorIs(t, err, ota.ErrInvalid, "%q", names)
	}
	b := newBench(t, kinds()[0], "acme-a", "acme-b+0")
	for _, c := range []driver.Choice{
		{Active: 2}, {Active: -1}, {Trial: true, Revert: -1, Tries: 1}, {Trial: true, Tries: 1}, {Active: 1, Revert: 2},
		{Active: 1, Trial: true, Tries: 10}, {Active: 1, Trial: true},
	} {
		require.Error(t, b.d.Write(t.Context(), c), "%+v", c)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := b.d.Read(ctx)
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorIs(t, b.d.Write(ctx, committed(0)), context.Canceled)
}

func FuzzName(f *testing.F) {
	for _, s := range []string{"a+1-2.conf", "a.efi", "+1.conf"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n := ParseName(s)
		require.Equal(t, n, ParseName(n.String()), "%q", s)
	})
}

func FuzzVersions(f *testing.F) {
	f.Add("1.2~rc3-4^5", "1_2")
	f.Fuzz(func(t *testing.T, a, b string) {
		require.Equal(t, compareVersions(a, b), -compareVersions(b, a))
		require.Zero(t, compareVersions(a, a))
	})
}

func FuzzRelease(f *testing.F) {
	f.Add(uki(osrel("1")))
	f.Fuzz(func(t *testing.T, b []byte) {
		text, err := release(bytes.NewReader(b))
		if err != nil {
			require.ErrorIs(t, err, ErrFormat)
			return
		}
		require.LessOrEqual(t, len(text), maxRelease)
		for k := range maps.Collect(pairs(text, "=")) {
			require.NotContains(t, k, "=")
		}
	})
}
