//go:build linux

// Bench measures installs beside their bounds and prints a table of ratios:
//
//	bench/run [-rounds 5] [-size 256] [-dir /dev/shm] [-rows regexp]
//
// Each row alternates with what it is compared with, in the same run, on slots with
// the same content, and shows medians. Slots are loop devices on files in -dir,
// which needs root and losetup (package mount); without them they are the files
// themselves, which is said. dd and openssl are those of the system.
//
// To add a row, write a function that measures and returns one, and list it in rows.
package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
)

func main() {
	b := &bench{}
	flag.IntVar(&b.rounds, "rounds", 5, "how often each thing is measured")
	flag.Int64Var(&b.size, "size", 256, "`MiB` of the image")
	dir := flag.String("dir", "/dev/shm", "`directory` of the slots")
	match := flag.String("rows", "", "only rows whose name matches `regexp`")
	flag.Parse()
	if err := b.run(*dir, *match); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// row is a line of the table.
type row struct {
	what     string
	ours     float64
	unit     string
	than     string // what it is compared with
	bound    float64
	want     float64 // ratio to be reached, 0 if none is set
	comments []string
}

// rows are what is measured.
var rows = []struct {
	name string
	run  func(*bench) ([]row, error)
}{
	{"local", local},
	{"same", same},
	{"resume", resume},
	{"nor", nor},
}

// bench is the surroundings of all rows.
type bench struct {
	rounds  int
	size    int64 // MiB
	dir     string
	slot    string // path of the target slot
	install string // path of the program
	images  [2]string
	bundles [2]string
	key     string
}

func (b *bench) run(dir, match string) (err error) {
	re, err := regexp.Compile(match)
	if err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp(dir, "ota-bench"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	detach, err := b.prepare()
	if detach != nil {
		defer detach()
	}
	if err != nil {
		return err
	}
	fmt.Printf("%-44s %12s   %-34s %12s  %6s  %s\n", "what", "", "compared with", "", "ratio", "")
	for _, r := range rows {
		if !re.MatchString(r.name) {
			continue
		}
		rs, err := r.run(b)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		for _, r := range rs {
			r.print()
		}
	}
	return nil
}

func (r *row) print() {
	ratio, target := "", ""
	if r.bound > 0 {
		ratio = fmt.Sprintf("%.3f", r.ours/r.bound)
		if r.want > 0 {
			target = fmt.Sprintf("wanted ≤ %v", r.want)
			if r.ours/r.bound > r.want {
				target += ": MISSED"
			}
		}
	}
	number := func(v float64) string { return strings.TrimSuffix(fmt.Sprintf("%.3f", v), ".000") + " " + r.unit }
	fmt.Printf("%-44s %12s   %-34s %12s  %6s  %s\n", r.what, number(r.ours), r.than, number(r.bound), ratio, target)
	for _, c := range r.comments {
		fmt.Println("  ", c)
	}
}

// prepare makes two images, their bundles, the program and the slot. detach gives
// the slot back.
func (b *bench) prepare() (detach func(), err error) {
	b.install = filepath.Join(b.dir, "install")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", b.install, "./bench/install")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	b.key = filepath.Join(b.dir, "key.pem")
	if err := os.WriteFile(b.key, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
		return nil, err
	}
	for i := range b.images {
		b.images[i] = filepath.Join(b.dir, fmt.Sprintf("v%d.img", i+1))
		b.bundles[i] = filepath.Join(b.dir, fmt.Sprintf("v%d.zip", i+1))
		if err := b.image(i, key); err != nil {
			return nil, err
		}
	}
	b.slot = filepath.Join(b.dir, "slot.img")
	if out, err := exec.Command("cp", b.images[0], b.slot).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	out, err := exec.Command("losetup", "-f", "--show", b.slot).Output()
	if err != nil {
		fmt.Printf("no loop device (%v): the slot is a file, in %s\n", err, b.dir)
		return nil, nil
	}
	loop := strings.TrimSpace(string(out))
	b.slot = loop
	return func() { exec.Command("losetup", "-d", loop).Run() }, nil
}

// image writes image i and its bundle.
func (b *bench) image(i int, key crypto.Signer) error {
	f, err := os.Create(b.images[i])
	if err != nil {
		return err
	}
	defer f.Close()
	rng := mrand.NewChaCha8([32]byte{byte(i)})
	if _, err := io.CopyN(f, rng, b.size<<20); err != nil {
		return err
	}
	z, err := os.Create(b.bundles[i])
	if err != nil {
		return err
	}
	defer z.Close()
	m := &bundle.Manifest{Name: "bench", Platform: "bench", Version: fmt.Sprint(i + 1), Parts: []bundle.Part{{Name: "rootfs", Src: "rootfs"}}}
	files := map[string]bundle.File{"rootfs": io.NewSectionReader(f, 0, b.size<<20)}
	return bundle.Write(context.Background(), z, m, files, &bundle.WriteOptions{Keys: []crypto.Signer{key}})
}

// reset puts image i into the slot, and what is read into the page cache.
func (b *bench) reset(i int) error {
	if err := run(nil, "dd", "if="+b.images[i], "of="+b.slot, "bs=4M", "conv=fsync,notrunc", "status=none"); err != nil {
		return err
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil && !errors.Is(err, os.ErrPermission) {
		return err
	}
	for _, name := range slices.Concat(b.images[:], b.bundles[:]) {
		if err := run(nil, "cat", name); err != nil {
			return err
		}
	}
	return nil
}

// check compares the slot with image i.
func (b *bench) check(i int) error {
	return run(nil, "cmp", "-n", fmt.Sprint(b.size<<20), b.slot, b.images[i])
}

// run runs a program.
func run(stdout io.Writer, name string, args ...string) error {
	var stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = stdout, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, stderr.Bytes())
	}
	return nil
}

// timed returns the seconds that fn takes.
func timed(fn func() error) (float64, error) {
	start := time.Now()
	err := fn()
	return time.Since(start).Seconds(), err
}

// installed is what the install program printed.
type installed struct {
	Wall, User, Sys, RSS, Heap, Allocated float64
	ota.Counts

	whole float64 // seconds from start to exit
}

// update installs bundle i. fresh makes the boot record forget all.
func (b *bench) update(i int, fresh bool) (r installed, err error) {
	state := filepath.Join(b.dir, "state")
	if fresh {
		if err := os.RemoveAll(state); err != nil {
			return r, err
		}
	}
	if err := os.MkdirAll(state, 0o700); err != nil {
		return r, err
	}
	var out bytes.Buffer
	r.whole, err = timed(func() error {
		return run(&out, b.install, "-bundle", b.bundles[i], "-key", b.key, "-slot", b.slot, "-state", state)
	})
	if err == nil {
		err = json.Unmarshal(out.Bytes(), &r)
	}
	return r, err
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	slices.Sort(v)
	return v[len(v)/2]
}

// spread shows how far the values of v are apart.
func spread(v []float64) string {
	return fmt.Sprintf("%.3f to %.3f", slices.Min(v), slices.Max(v))
}

// local: a signed bundle in a file, installed into a slot that holds something else,
// and read back, beside dd and openssl, which check no signature.
func local(b *bench) ([]row, error) {
	var ours, ddOnly, theirs, cpu, rss, heap []float64
	for range b.rounds {
		if err := b.reset(0); err != nil {
			return nil, err
		}
		r, err := b.update(1, true)
		if err != nil {
			return nil, err
		}
		if err := b.check(1); err != nil {
			return nil, err
		}
		ours, cpu, rss, heap = append(ours, r.whole), append(cpu, r.User+r.Sys), append(rss, r.RSS), append(heap, r.Heap)
		if err := b.reset(0); err != nil {
			return nil, err
		}
		dd, err := timed(func() error {
			return run(nil, "dd", "if="+b.images[1], "of="+b.slot, "bs=1M", "conv=fsync,notrunc", "status=none")
		})
		if err != nil {
			return nil, err
		}
		hash, err := timed(func() error {
			// What dd has left in the page cache is not what the medium holds.
			if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil && !errors.Is(err, os.ErrPermission) {
				return err
			}
			return run(nil, "openssl", "dgst", "-sha256", b.slot)
		})
		if err != nil {
			return nil, err
		}
		ddOnly, theirs = append(ddOnly, dd), append(theirs, dd+hash)
	}
	what := fmt.Sprintf("local signed bundle, %d MiB", b.size)
	return []row{
		{what: what, ours: median(ours), unit: "s", than: "dd conv=fsync; openssl sha256", bound: median(theirs), want: 0.5,
			comments: []string{
				"ours " + spread(ours) + ", theirs " + spread(theirs),
				fmt.Sprintf("CPU %.2f s, heap %.1f MiB", median(cpu), median(heap)),
			}},
		{what: "  the same", ours: median(ours), unit: "s", than: "dd conv=fsync, which reads nothing back", bound: median(ddOnly)},
		{what: "  peak RSS", ours: median(rss), unit: "MiB", than: "figure to keep", bound: 14, want: 1},
	}, nil
}

// same: the image that is installed already.
func same(b *bench) ([]row, error) {
	if err := b.reset(0); err != nil {
		return nil, err
	}
	if _, err := b.update(1, true); err != nil {
		return nil, err
	}
	var known, unknown, first []float64
	written := int64(0)
	for range b.rounds {
		if err := b.reset(0); err != nil {
			return nil, err
		}
		r, err := b.update(1, true)
		if err != nil {
			return nil, err
		}
		first = append(first, r.whole)
		if r, err = b.update(1, false); err != nil {
			return nil, err
		}
		known, written = append(known, r.whole), written+r.Written
		// Without a boot record that knows of it, it is compared.
		if r, err = b.update(1, true); err != nil {
			return nil, err
		}
		unknown = append(unknown, r.whole)
	}
	return []row{
		{what: "same image again", ours: median(known), unit: "s", than: "the first time", bound: median(first)},
		{what: "  written", ours: float64(written) / (1 << 20), unit: "MiB", than: "the image", bound: float64(b.size) * float64(b.rounds), want: 1e-9},
		{what: "same image, boot record lost", ours: median(unknown), unit: "s", than: "the first time", bound: median(first)},
	}, nil
}

// resume: killed at a random moment, again and again, until an install gets through.
func resume(b *bench) ([]row, error) {
	if err := b.reset(0); err != nil {
		return nil, err
	}
	clean, err := b.update(1, true)
	if err != nil {
		return nil, err
	}
	if err := b.reset(0); err != nil {
		return nil, err
	}
	before, err := writtenTo(b.slot)
	if err != nil {
		return []row{{what: "resume", than: "no loop device to count at: " + err.Error()}}, nil
	}
	state := filepath.Join(b.dir, "state")
	if err := os.RemoveAll(state); err != nil {
		return nil, err
	}
	if err := os.Mkdir(state, 0o700); err != nil {
		return nil, err
	}
	const kills = 20
	for range kills {
		cmd := exec.Command(b.install, "-bundle", b.bundles[1], "-key", b.key, "-slot", b.slot, "-state", state)
		if err := cmd.Start(); err != nil {
			return nil, err
		}
		time.Sleep(time.Duration(mrand.Float64() * clean.whole * 0.9 * float64(time.Second)))
		cmd.Process.Signal(syscall.SIGKILL)
		cmd.Wait()
	}
	last, err := b.update(1, false)
	if err != nil {
		return nil, err
	}
	if err := b.check(1); err != nil {
		return nil, err
	}
	after, err := writtenTo(b.slot)
	if err != nil {
		return nil, err
	}
	return []row{{what: fmt.Sprintf("killed %d times, written at the device", kills), ours: float64(after-before) / (1 << 20), unit: "MiB",
		than: "one clean run", bound: float64(clean.Written) / (1 << 20), want: 1.05,
		comments: []string{fmt.Sprintf("the last run wrote %.1f MiB", float64(last.Written)/(1<<20))}}}, nil
}

// writtenTo returns how many bytes were written to a block device so far: Linux,
// Documentation/block/stat.rst, write sectors.
func writtenTo(dev string) (int64, error) {
	text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(dev), "stat"))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(text))
	if len(f) < 7 {
		return 0, fmt.Errorf("%q", text)
	}
	var n int64
	_, err = fmt.Sscan(f[6], &n)
	return n * 512, err
}

// nor: erases of a simulated NOR flash, for a firmware that differs here and there.
func nor(*bench) ([]row, error) {
	const size, sector = 1 << 20, 4 << 10
	cfg := memflash.Config{Size: size, EraseSize: sector, WriteSize: 256}
	d, err := sim.New(sim.Geometry{App: cfg, FS: memflash.Config{Size: sector}, Record: memflash.Config{Size: sector}})
	if err != nil {
		return nil, err
	}
	d.Running = 0
	ctx := context.Background()
	dev, err := ota.Open(ctx, d.Record, d.Slots, &ota.Options{Platform: "sim"})
	if err != nil {
		return nil, err
	}
	content := make([]byte, size)
	mrand.NewChaCha8([32]byte{}).Read(content)
	update := func() error {
		img := &sim.Image{V: 2, Unsigned: true, Mutate: func(i *ota.ImageInfo) {
			i.Unsigned = true
			i.Parts[0].Size, i.Parts[0].SHA256 = size, nil
		}, Wrap: func(part string, r io.Reader) io.Reader {
			if part == "app" {
				return bytes.NewReader(content)
			}
			return r
		}}
		if _, err := dev.Update(ctx, img, nil); err != nil {
			return err
		}
		return dev.Revert(ctx)
	}
	if err := update(); err != nil {
		return nil, err
	}
	before := d.Chip.Wear(2)
	changed := map[int]bool{}
	for range 40 {
		at := mrand.IntN(size)
		content[at]++
		changed[at/sector] = true
	}
	if err := update(); err != nil {
		return nil, err
	}
	erased, most := 0, 0
	for i, n := range d.Chip.Wear(2) {
		erased += n - before[i]
		most = max(most, n-before[i])
	}
	return []row{{what: "NOR, 1 MiB in sectors of 4 KiB: erases", ours: float64(erased), than: "sectors that changed", bound: float64(len(changed)), want: 1,
		comments: []string{fmt.Sprintf("no sector more than %d times", most)}}}, nil
}
