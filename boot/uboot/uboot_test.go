package uboot

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
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

// golden returns a file of testdata. All were made by mkenvimage, fw_setenv or
// U-Boot itself.
func golden(t *testing.T, name string) []byte {
	b, err := os.ReadFile(filepath.Join("testdata", name))
	require.NoError(t, err)
	return b
}

// load returns storage in memory with the given content.
func load(t *testing.T, cfg memflash.Config, contents ...[]byte) (*memflash.Chip, []ota.Flash) {
	if cfg.Size == 0 {
		cfg.Size = int64(len(contents[0]))
	}
	chip := memflash.NewChip(slices.Repeat([]memflash.Config{cfg}, len(contents))...)
	for i, b := range contents {
		require.NoError(t, chip.Poke(i, b, 0))
	}
	return chip, chip.Flashes()
}

func newEnv(t *testing.T, o *EnvOptions, fs ...ota.Flash) *Env {
	e, err := NewEnv(fs, o)
	require.NoError(t, err)
	return e
}

func TestGolden(t *testing.T) {
	want := Vars{{"BOOT_A_LEFT", "3"}, {"BOOT_B_LEFT", "3"}, {"BOOT_ORDER", "A B"}}
	for _, tc := range []struct {
		name  string
		files []string
		o     EnvOptions
	}{
		{"single", []string{"single.bin"}, EnvOptions{}},
		{"big-endian", []string{"single-bigendian.bin"}, EnvOptions{BigEndian: true}},
		{"redundant", []string{"redund0.bin", "redund1.bin"}, EnvOptions{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var raw [][]byte
			for _, f := range tc.files {
				raw = append(raw, golden(t, f))
			}
			_, fs := load(t, memflash.Config{}, raw...)
			v, err := newEnv(t, &tc.o, fs...).Read(t.Context())
			require.NoError(t, err)
			for _, w := range want {
				got, ok := v.Get(w.Name)
				require.True(t, ok, w.Name)
				require.Equal(t, w.Value, got)
			}
			// Encoded again it is the same, but for the padding, which is each
			// tool's own.
			header := int64(3 + len(tc.files))
			data := make([]byte, len(raw[0])-int(header))
			require.NoError(t, format(data, v))
			end := bytes.Index(data, []byte{0, 0})
			require.Equal(t, raw[0][header:header+int64(end)+2], data[:end+2])
		})
	}
	for _, f := range []string{"after-libubootenv-1.bin", "after-uboot-0.bin"} {
		raw := golden(t, f)
		require.Equal(t, binary.LittleEndian.Uint32(raw), crc32.ChecksumIEEE(raw[5:]), f)
		require.NotEmpty(t, parse(raw[5:]), f)
	}
}

// TestNewer holds the choice of a copy against what U-Boot and both tools do.
func TestNewer(t *testing.T) {
	for _, tc := range []struct {
		scheme Flags
		a, b   byte
		want   int
	}{
		{Incremental, 1, 2, 1}, {Incremental, 2, 1, 0}, {Incremental, 7, 7, 0},
		{Incremental, 255, 0, 1}, {Incremental, 0, 255, 0},
		{Incremental, 200, 10, 0}, {Incremental, 10, 200, 1}, {Incremental, 254, 0, 0},
		{Boolean, 1, 0, 0}, {Boolean, 0, 1, 1}, {Boolean, 1, 1, 0}, {Boolean, 0, 0, 0},
		{Boolean, 255, 0, 0}, {Boolean, 0, 255, 1}, {Boolean, 255, 1, 0}, {Boolean, 1, 255, 1}, {Boolean, 3, 4, 0},
	} {
		require.Equal(t, tc.want, newer(tc.scheme, tc.a, tc.b), "%v", tc)
	}
}

func TestWrap(t *testing.T) {
	_, fs := load(t, memflash.Config{}, golden(t, "redund0.bin"), golden(t, "redund1.bin"))
	e := newEnv(t, nil, fs...)
	for i := range 600 {
		want := strconv.Itoa(i)
		require.NoError(t, e.Write(t.Context(), Set("n", want)))
		v, err := e.Read(t.Context())
		require.NoError(t, err)
		got, _ := v.Get("n")
		require.Equal(t, want, got)
	}
}

func TestRefuses(t *testing.T) {
	ctx := t.Context()
	good := golden(t, "redund0.bin")
	bad := bytes.Repeat([]byte{0xff}, len(good))

	// Without a valid copy nothing is written: all would be lost.
	chip, fs := load(t, memflash.Config{}, bad, bad)
	before := chip.Clone()
	err := newEnv(t, nil, fs...).Write(ctx, Set("a", "b"))
	require.ErrorIs(t, err, ErrNoEnvironment)
	require.True(t, chip.Equal(before))

	// A copy that cannot be read may be the newer one.
	chip, fs = load(t, memflash.Config{}, good, good)
	chip.Plan(memflash.Fault{Kind: memflash.Fail, On: memflash.OpRead, At: 1})
	_, err = newEnv(t, nil, fs...).Read(ctx)
	require.ErrorIs(t, err, memflash.ErrFault)

	_, fs = load(t, memflash.Config{}, golden(t, "single.bin"))
	require.ErrorIs(t, newEnv(t, nil, fs...).Write(ctx, Set("a", "b")), ErrSingle)
	require.NoError(t, newEnv(t, &EnvOptions{AllowSingle: true}, fs...).Write(ctx, Set("a", "b")))

	_, fs = load(t, memflash.Config{}, good, good)
	e := newEnv(t, nil, fs...)
	require.ErrorIs(t, e.Write(ctx, Set("a", strings.Repeat("x", len(good)))), ErrFull)
	for _, name := range []string{"", "a=b", "a\x00"} {
		require.ErrorIs(t, e.Write(ctx, Set(name, "x")), ota.ErrInvalid, "%q", name)
	}
	require.ErrorIs(t, e.Write(ctx, Set("a", "\x00")), ota.ErrInvalid)

	_, err = NewEnv(fs, &EnvOptions{Size: 1 << 30})
	require.ErrorIs(t, err, ota.ErrInvalid)
	_, err = NewEnv(nil, nil)
	require.ErrorIs(t, err, ota.ErrInvalid)
}

func TestParseConfig(t *testing.T) {
	ls, err := ParseConfig(strings.NewReader("# comment\n/dev/mtd1 0x0000 0x4000 0x4000 2 1 # x\n\n/dev/mmcblk0 -0x2000 0x4000\n/dev/ignored 0 0x4000\n"))
	require.NoError(t, err)
	require.Equal(t, []Location{
		{Path: "/dev/mtd1", Size: 0x4000, SectorSize: 0x4000, Sectors: 2, NoLock: true},
		{Path: "/dev/mmcblk0", Offset: -0x2000, Size: 0x4000},
	}, ls)
	for _, bad := range []string{"", "# only a comment", "/dev/x", "/dev/x 0 0", "/dev/x 0 12z", "/dev/x 0 0x4000 -1", "/dev/x 0 0x4000 1 1 1 1",
		"/dev/x 0 0x4000\n/dev/y 0 0x2000", "/dev/x 0 0x40000000"} {
		_, err := ParseConfig(strings.NewReader(bad))
		require.ErrorIs(t, err, ota.ErrInvalid, "%q", bad)
	}
}

// board are variables that nobody may lose.
var board = Vars{{"ethaddr", "02:00:00:00:00:01"}, {"bootcmd", "run a; run b"}, {"empty", ""}}

// image returns a copy of an environment.
func image(size int, flags byte, vars Vars) []byte {
	raw := make([]byte, size)
	raw[4] = flags
	if err := format(raw[5:], vars); err != nil {
		panic(err)
	}
	binary.LittleEndian.PutUint32(raw, crc32.ChecksumIEEE(raw[5:]))
	return raw
}

// script is what a boot script does with the variables; it returns the name of the
// slot to start, "" if there is none.
type script func(v Vars) (string, []Change)

func hex(v Vars, name string) int64 {
	s, _ := v.Get(name)
	n, _ := strconv.ParseInt(s, 16, 32)
	return n
}

// raucScript follows contrib/uboot.sh of RAUC.
func raucScript(v Vars) (string, []Change) {
	order, ok := v.Get("BOOT_ORDER")
	if !ok {
		return "A", nil
	}
	for _, n := range strings.Fields(order) {
		if left := hex(v, "BOOT_"+n+"_LEFT"); left > 0 {
			return n, []Change{Set("BOOT_"+n+"_LEFT", fmt.Sprintf("%x", left-1))}
		}
	}
	return "", nil
}

// countScript is what U-Boot does with a boot counter in the environment, and an
// altbootcmd as documented.
func countScript(alt func(v Vars) []Change, variable string) script {
	return func(v Vars) (string, []Change) {
		var changes []Change
		if up, _ := v.Get("upgrade_available"); up == "1" {
			s, _ := v.Get("bootcount")
			n, _ := strconv.Atoi(s)
			s, _ = v.Get("bootlimit")
			limit, _ := strconv.Atoi(s)
			changes = []Change{Set("bootcount", strconv.Itoa(n+1))}
			if limit > 0 && n+1 > limit {
				changes = append(changes, alt(v)...)
			}
		}
		name, ok := v.with(changes).Get(variable)
		if !ok {
			return "1", nil
		}
		return name, changes
	}
}

func loaders() []loadertest.Loader {
	var ls []loadertest.Loader
	for _, sc := range []struct {
		name string
		c    DriverConfig
		vars Vars
		run  script
	}{
		{"rauc", DriverConfig{Scheme: RAUC, Names: []string{"A", "B"}}, nil, raucScript},
		{"bootcount", DriverConfig{Scheme: Bootcount, Names: []string{"1", "2"}, Variable: "slot"}, nil, countScript(func(v Vars) []Change {
			back, _ := v.Get("ota_revert")
			return []Change{Set("slot", back), Set("upgrade_available", "0"), Set("bootcount", "0")}
		}, "slot")},
	} {
		for _, medium := range []struct {
			name string
			cfg  memflash.Config
			o    EnvOptions
		}{
			{"block", memflash.Config{Size: 1024, Unsynced: true}, EnvOptions{}},
			{"nor", memflash.Config{Size: 2048, EraseSize: 1024, Rewrite: true}, EnvOptions{Size: 1024, Flags: Boolean}},
		} {
			vars := append(slices.Clone(board), sc.vars...)
			ls = append(ls, loadertest.Loader{
				Name:    sc.name + "-" + medium.name,
				Flashes: []memflash.Config{medium.cfg, medium.cfg},
				Format: func(fs []ota.Flash) error {
					for i, f := range fs {
						if _, err := f.WriteAt(image(1024, byte(1-i), vars), 0); err != nil {
							return err
						}
						if err := f.Sync(); err != nil {
							return err
						}
					}
					return nil
				},
				Open: func(fs []ota.Flash, running func(context.Context) (ota.SlotID, error)) (driver.Driver, error) {
					e, err := NewEnv(fs, &medium.o)
					if err != nil {
						return nil, err
					}
					c := sc.c
					c.Running = running
					return NewDriver(e, &c)
				},
				Boot: func(ctx context.Context, fs []ota.Flash) (ota.SlotID, error) {
					e, err := NewEnv(fs, &medium.o)
					if err != nil {
						return ota.NoSlot, err
					}
					v, err := e.Read(ctx)
					if err != nil {
						return ota.NoSlot, err
					}
					name, changes := sc.run(v)
					id := slices.Index(sc.c.Names, name)
					if id < 0 {
						return ota.NoSlot, fmt.Errorf("script found %q", name)
					}
					return ota.SlotID(id), e.Write(ctx, changes...)
				},
				Wears: sc.c.Scheme == RAUC,
				Weak:  true, // two copies cannot tell
				Intact: func(fs []ota.Flash) error {
					e, err := NewEnv(fs, &medium.o)
					if err != nil {
						return err
					}
					v, err := e.Read(context.Background())
					if err != nil {
						return err
					}
					for _, w := range board {
						if got, ok := v.Get(w.Name); !ok || got != w.Value {
							return fmt.Errorf("variable %s is %q", w.Name, got)
						}
					}
					return nil
				},
			})
		}
	}
	return ls
}

func TestConformance(t *testing.T) {
	for _, l := range loaders() {
		t.Run(l.Name, l.Conformance)
	}
}

func TestPowerCuts(t *testing.T) {
	for _, l := range loaders() {
		l.Replay, l.Twice = *replay, *long
		l.PowerCuts(t)
	}
}

// TestMender: the scheme has one try, so that boottest, which stores three, does
// not apply.
func TestMender(t *testing.T) {
	ctx := t.Context()
	_, fs := load(t, memflash.Config{}, image(1024, 1, board), image(1024, 0, board))
	e := newEnv(t, nil, fs...)
	d, err := NewDriver(e, &DriverConfig{Scheme: Mender, Names: []string{"2", "10"}, Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
	require.NoError(t, err)
	_, err = d.Read(ctx)
	require.ErrorIs(t, err, ota.ErrNoBootState)
	trial := driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}
	require.NoError(t, d.Write(ctx, trial))
	c, err := d.Read(ctx)
	require.NoError(t, err)
	require.Equal(t, driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 0}, func() driver.Choice {
		v, err := e.Read(ctx)
		require.NoError(t, err)
		_, changes := countScript(nil, "mender_boot_part")(v)
		require.NoError(t, e.Write(ctx, changes...))
		c, err := d.Read(ctx)
		require.NoError(t, err)
		require.True(t, c.Booted)
		c.Booted = false
		return c
	}())
	require.Equal(t, trial, c)
	v, err := e.Read(ctx)
	require.NoError(t, err)
	hex, _ := v.Get("mender_boot_part_hex")
	require.Equal(t, "a", hex)
	require.NoError(t, d.Write(ctx, driver.Choice{Active: 1, Revert: ota.NoSlot}))
	c, err = d.Read(ctx)
	require.NoError(t, err)
	require.Equal(t, driver.Choice{Active: 1, Revert: ota.NoSlot}, c)
	_, err = NewDriver(e, &DriverConfig{Scheme: Mender, Names: []string{"a", "b"}})
	require.ErrorIs(t, err, ota.ErrInvalid)
}

// TestHostileVariables: whatever the variables are, there is an answer or a typed
// error.
func TestHostileVariables(t *testing.T) {
	ctx := t.Context()
	for _, vars := range []Vars{
		{{"BOOT_ORDER", "C"}}, {{"BOOT_ORDER", ""}}, {{"BOOT_ORDER", "A B"}, {"BOOT_A_LEFT", "zz"}},
		{{"BOOT_ORDER", "A B"}, {"BOOT_A_LEFT", "0"}, {"BOOT_B_LEFT", "0"}}, {{"BOOT_ORDER", "A"}, {"BOOT_A_LEFT", "fffffffff"}},
	} {
		_, fs := load(t, memflash.Config{}, image(512, 1, vars), image(512, 0, vars))
		d, err := NewDriver(newEnv(t, nil, fs...), &DriverConfig{Names: []string{"A", "B"}})
		require.NoError(t, err)
		_, err = d.Read(ctx)
		require.ErrorIs(t, err, ota.ErrBadBootState, "%v", vars)
	}
	_, fs := load(t, memflash.Config{}, make([]byte, 512), make([]byte, 512))
	d, err := NewDriver(newEnv(t, nil, fs...), &DriverConfig{Names: []string{"A", "B"}})
	require.NoError(t, err)
	_, err = d.Read(ctx)
	require.ErrorIs(t, err, ErrNoEnvironment)
	require.ErrorIs(t, err, ota.ErrBadBootState)
}

// tools returns the paths of programs of a Debian package.
func tools(t *testing.T, pkg string, names ...string) (paths []string) {
	for _, n := range names {
		p, err := exec.LookPath(n)
		if err != nil {
			msg := fmt.Sprintf("%s is not installed: apt-get install %s", n, pkg)
			if os.Getenv("CI") == "true" {
				t.Fatal(msg)
			}
			t.Skip(msg)
		}
		paths = append(paths, p)
	}
	return paths
}

// TestTool: what libubootenv writes is read here and the other way round, for
// random environments in all arrangements that a file can have.
func TestTool(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("libubootenv is for Linux")
	}
	p := tools(t, "libubootenv-tool", "fw_printenv", "fw_setenv")
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, tc := range []struct {
		name   string
		config string
		copies int
	}{
		{"single file", "%[1]s/a 0 0x1000\n", 1},
		{"two files", "%[1]s/a 0 0x1000\n%[1]s/b 0 0x1000\n", 2},
		{"one file, two offsets", "%[1]s/a 0x1000 0x1000\n%[1]s/a 0x3000 0x1000\n", 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			config := filepath.Join(dir, "fw_env.config")
			require.NoError(t, os.WriteFile(config, fmt.Appendf(nil, tc.config, dir), 0o600))
			first := image(0x1000, 1, board)
			if tc.copies == 1 {
				first = make([]byte, 0x1000)
				require.NoError(t, format(first[4:], board))
				binary.LittleEndian.PutUint32(first, crc32.ChecksumIEEE(first[4:]))
			}
			switch tc.name {
			case "one file, two offsets":
				whole := make([]byte, 0x5000)
				copy(whole[0x1000:], first)
				copy(whole[0x3000:], image(0x1000, 0, board))
				require.NoError(t, os.WriteFile(filepath.Join(dir, "a"), whole, 0o600))
			default:
				require.NoError(t, os.WriteFile(filepath.Join(dir, "a"), first, 0o600))
				require.NoError(t, os.WriteFile(filepath.Join(dir, "b"), image(0x1000, 0, board), 0o600))
			}
			e, err := Open(&Config{File: config, Locks: []string{filepath.Join(dir, "lock")}})
			require.NoError(t, err)
			want := map[string]string{}
			for _, v := range board {
				if v.Value != "" {
					want[v.Name] = v.Value
				}
			}
			for range 25 {
				name := fmt.Sprintf("v%d", rnd.IntN(8))
				value := string(bytes.Repeat([]byte{byte('!' + rnd.IntN(90))}, 1+rnd.IntN(200)))
				if rnd.IntN(2) == 0 {
					require.NoError(t, e.Write(t.Context(), Set(name, value)))
				} else {
					out, err := exec.Command(p[1], "-c", config, name, value).CombinedOutput()
					require.NoError(t, err, "%s", out)
				}
				want[name] = value
				v, err := e.Read(t.Context())
				require.NoError(t, err)
				for n, w := range want {
					got, _ := v.Get(n)
					require.Equal(t, w, got, n)
					out, err := exec.Command(p[0], "-c", config, "-n", n).Output()
					require.NoError(t, err)
					require.Equal(t, w, strings.TrimSuffix(string(out), "\n"), n)
				}
			}
		})
	}
}

// TestMkenvimage reads what mkenvimage makes.
func TestMkenvimage(t *testing.T) {
	p := tools(t, "u-boot-tools", "mkenvimage")
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	require.NoError(t, os.WriteFile(src, []byte("a=1\nb=two words\n"), 0o600))
	for _, args := range [][]string{{"-s", "1024"}, {"-s", "1024", "-b"}, {"-s", "1024", "-r"}, {"-s", "1024", "-r", "-b", "-p", "0"}} {
		out := filepath.Join(dir, "out")
		b, err := exec.Command(p[0], append(args, "-o", out, src)...).CombinedOutput()
		require.NoError(t, err, "%s", b)
		raw, err := os.ReadFile(out)
		require.NoError(t, err)
		o := EnvOptions{BigEndian: slices.Contains(args, "-b")}
		contents := [][]byte{raw}
		if slices.Contains(args, "-r") {
			contents = append(contents, make([]byte, len(raw)))
		}
		_, fs := load(t, memflash.Config{}, contents...)
		v, err := newEnv(t, &o, fs...).Read(t.Context())
		require.NoError(t, err, "%v", args)
		require.Equal(t, Vars{{"a", "1"}, {"b", "two words"}}, v)
	}
}

func FuzzEnv(f *testing.F) {
	f.Add(image(64, 1, board[:1]), byte(0))
	f.Fuzz(func(t *testing.T, raw []byte, flags byte) {
		if len(raw) < minSize || len(raw) > 1<<12 {
			return
		}
		binary.LittleEndian.PutUint32(raw, crc32.ChecksumIEEE(raw[5:]))
		_, fs := load(t, memflash.Config{}, raw, make([]byte, len(raw)))
		e := newEnv(t, &EnvOptions{Flags: Flags(flags % 2)}, fs...)
		old, err := e.Read(t.Context())
		require.NoError(t, err)
		err = e.Write(t.Context(), Set("new", "value"))
		if errors.Is(err, ErrFull) {
			return
		}
		require.NoError(t, err)
		v, err := e.Read(t.Context())
		require.NoError(t, err)
		require.Equal(t, old.with([]Change{Set("new", "value")}), v)
	})
}
