//go:build linux

// Bench measures installs beside their bounds and prints a table of ratios; see
// README.md. To add a row, write a function that measures and returns one, and list
// it in rows.
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
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
)

func main() {
	b := &bench{}
	flag.IntVar(&b.rounds, "rounds", 5, "how often each thing is measured")
	mib := flag.Int64("size", 256, "`MiB` of the image, if it is made up")
	dir := flag.String("dir", "/dev/shm", "`directory` of the slots and bundles")
	peers := flag.String("peers", ".", "only other updaters whose name matches `regexp`")
	match := flag.String("rows", "", "only rows whose name matches `regexp`")
	b.pack.Encoding = bundle.EncodingZstd
	flag.IntVar(&b.pack.Level, "level", 0, "`level` of zstd in bundles; 0 means the default, as in the next ones")
	flag.Int64Var(&b.pack.Frame, "frame", 0, "`bytes` of a frame")
	flag.Int64Var(&b.pack.Chunk, "chunk", 0, "`bytes` of a chunk")
	flag.StringVar(&b.profile, "profile", "", "`file` for a CPU profile of the last install")
	flag.Parse()
	b.size = *mib << 20
	if err := b.run(*dir, *match, *peers); err != nil {
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
	{"stored", stored},
	{"zstd", zstd},
	{"http", overHTTP},
	{"memory", memory},
	{"small", smallChange},
	{"same", same},
	{"resume", resume},
	{"nor", nor},
	{"create", create},
}

// bench is the surroundings of all rows.
type bench struct {
	rounds  int
	size    int64 // of an image
	dir     string
	profile string
	pack    bundle.Packing // of compressed bundles
	install string         // path of the program
	key     string
	old     string // image: version 1
	new     string // image: version 2
	junk    string // image that has nothing in common with them
	slots   [2]string
	made    map[string]string // bundles, by name
	signer  crypto.Signer
	only    *regexp.Regexp // peers
	close   []func()
}

func (b *bench) run(dir, match, peers string) (err error) {
	re, err := regexp.Compile(match)
	if err != nil {
		return err
	}
	if b.only, err = regexp.Compile(peers); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp(dir, "ota-bench"); err != nil {
		return err
	}
	tidy := sync.OnceFunc(func() {
		for _, fn := range slices.Backward(b.close) {
			fn()
		}
		os.RemoveAll(b.dir)
	})
	defer tidy()
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-stop
		tidy()
		os.Exit(1)
	}()
	if err := b.prepare(); err != nil {
		return err
	}
	fmt.Println(machine())
	fmt.Printf("%-46s %12s   %-42s %12s  %6s  %s\n", "what", "", "compared with", "", "ratio", "")
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
		fmt.Println("   load average", load())
	}
	return nil
}

// machine says what the figures are of.
func machine() string {
	model := runtime.GOARCH
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if k, v, _ := strings.Cut(line, ":"); strings.TrimSpace(k) == "model name" {
				model = strings.TrimSpace(v)
				break
			}
		}
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return fmt.Sprintf("%s, %d cores, Linux %s, %s", model, runtime.NumCPU(), strings.TrimSpace(string(kernel)), runtime.Version())
}

func load() string {
	text, _ := os.ReadFile("/proc/loadavg")
	return strings.Join(strings.Fields(string(text))[:1], "")
}

func (r *row) print() {
	number := func(v float64) string { return strings.TrimSuffix(fmt.Sprintf("%.3f", v), ".000") + " " + r.unit }
	bound, ratio, target := "", "", ""
	if r.bound > 0 {
		bound = number(r.bound)
		ratio = fmt.Sprintf("%.3f", r.ours/r.bound)
		if r.want > 0 {
			target = fmt.Sprintf("wanted ≤ %v", r.want)
			if r.ours/r.bound > r.want {
				target += ": MISSED"
			}
		}
	}
	fmt.Printf("%-46s %12s   %-42s %12s  %6s  %s\n", r.what, number(r.ours), r.than, bound, ratio, target)
	for _, c := range r.comments {
		fmt.Println("  ", c)
	}
}

// prepare makes the images, the program and the slots.
func (b *bench) prepare() error {
	b.install = filepath.Join(b.dir, "install")
	if err := build(b.install, "./bench/install"); err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	b.signer = key
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	b.key = filepath.Join(b.dir, "key.pem")
	if err := os.WriteFile(b.key, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
		return err
	}
	if err := b.images(); err != nil {
		return err
	}
	for i := range b.slots {
		path := filepath.Join(b.dir, fmt.Sprintf("slot%d.img", i))
		if err := copyFile(path, b.old); err != nil {
			return err
		}
		out, err := exec.Command("losetup", "-f", "--show", path).Output()
		if err != nil {
			fmt.Printf("no loop device (%v): slot %d is a file, in %s\n", err, i, b.dir)
			b.slots[i] = path
			continue
		}
		b.slots[i] = strings.TrimSpace(string(out))
		b.close = append(b.close, func() { exec.Command("losetup", "-d", b.slots[i]).Run() })
	}
	b.made = map[string]string{}
	return nil
}

func build(out, pkg string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, text)
	}
	return nil
}

func copyFile(to, from string) error { return run(nil, "cp", from, to) }

// images finds or makes up the images.
func (b *bench) images() error {
	b.junk = filepath.Join(b.dir, "junk.img")
	b.old, b.new = os.Getenv("BENCH_OLD"), os.Getenv("BENCH_NEW")
	if (b.old == "") != (b.new == "") {
		return errors.New("BENCH_OLD and BENCH_NEW go together")
	}
	if b.old == "" {
		b.old, b.new = filepath.Join(b.dir, "v1.img"), filepath.Join(b.dir, "v2.img")
		if err := makeUp(b.old, b.new, b.size); err != nil {
			return err
		}
	}
	for _, p := range []*string{&b.old, &b.new} {
		if filepath.Dir(*p) == b.dir {
			continue
		}
		// In memory, all of them, as the slots are.
		to := filepath.Join(b.dir, filepath.Base(*p))
		if err := copyFile(to, *p); err != nil {
			return err
		}
		*p = to
	}
	old, err := os.Stat(b.old)
	if err != nil {
		return err
	}
	st, err := os.Stat(b.new)
	if err != nil {
		return err
	}
	if old.Size() != st.Size() {
		return fmt.Errorf("images of %d and of %d bytes", old.Size(), st.Size())
	}
	b.size = st.Size()
	f, err := os.Create(b.junk)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyN(f, mrand.NewChaCha8([32]byte{9}), b.size)
	return err
}

// makeUp writes two images of size bytes that look like file systems: a third is
// text, a third is like programs, a third is empty. One in a hundred files of the
// second one is new, and one in a hundred lies elsewhere.
func makeUp(old, new string, size int64) error {
	rng := mrand.New(mrand.NewChaCha8([32]byte{1}))
	words := make([][]byte, 4000)
	for i := range words {
		words[i] = make([]byte, 3+rng.IntN(9))
		for k := range words[i] {
			words[i][k] = byte('a' + rng.IntN(26))
		}
	}
	file := func(n int64) []byte {
		b := make([]byte, 0, n+16)
		switch rng.IntN(3) {
		case 0:
			for int64(len(b)) < n {
				b = append(append(b, words[rng.IntN(len(words))]...), ' ')
			}
		case 1:
			for int64(len(b)) < n {
				b = append(b, 0x48, 0x8b, byte(rng.Uint32()), byte(rng.IntN(16)), byte(rng.Uint32()), 0, 0, byte(rng.IntN(64)))
			}
		}
		return b[:n:n]
	}
	var v1, v2 bytes.Buffer
	for int64(v1.Len()) < size {
		n := min(4096*(1+int64(rng.ExpFloat64()*16)), size-int64(v1.Len()))
		f := file(n)
		v1.Write(f)
		switch rng.IntN(100) {
		case 0:
			f = file(n)
		case 1:
			if at := int64(v2.Len()) / 2 / 4096 * 4096; at >= n {
				f = bytes.Clone(v2.Bytes()[at-n : at])
			}
		}
		v2.Write(f)
	}
	if err := os.WriteFile(old, v1.Bytes(), 0o600); err != nil {
		return err
	}
	return os.WriteFile(new, v2.Bytes(), 0o600)
}

// bundle returns the path of the bundle of an image that is packed like this.
func (b *bench) bundle(name, image string, k bundle.Packing) (string, error) {
	if path := b.made[name]; path != "" {
		return path, nil
	}
	f, err := os.Open(image)
	if err != nil {
		return "", err
	}
	defer f.Close()
	path := filepath.Join(b.dir, name+".zip")
	z, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer z.Close()
	m := &bundle.Manifest{Name: "bench", Platform: "bench", Version: "2", Parts: []bundle.Part{{Name: "rootfs", Src: "rootfs"}}}
	files := map[string]bundle.File{"rootfs": io.NewSectionReader(f, 0, b.size)}
	err = bundle.Write(context.Background(), z, m, files, &bundle.WriteOptions{Keys: []crypto.Signer{b.signer},
		Pack: map[string]bundle.Packing{"rootfs": k}})
	if err != nil {
		return "", err
	}
	b.made[name] = path
	return path, z.Close()
}

// The bundles of most rows.
func (b *bench) stored() (string, error) { return b.bundle("stored", b.new, bundle.Packing{}) }
func (b *bench) zstd() (string, error)   { return b.bundle("zstd", b.new, b.pack) }

// fill puts an image into a slot, and leaves none of the slot in the page cache.
func (b *bench) fill(slot int, image string) error {
	if err := run(nil, "dd", "if="+image, "of="+b.slots[slot], "bs=4M", "conv=fsync,notrunc", "status=none"); err != nil {
		return err
	}
	return dropCaches()
}

// dropCaches makes the next read ask the medium. What is in tmpfs stays.
func dropCaches() error {
	err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0)
	if errors.Is(err, os.ErrPermission) {
		return nil
	}
	return err
}

// check compares the target slot with the new image.
func (b *bench) check() error {
	return run(nil, "cmp", "-n", fmt.Sprint(b.size), b.slots[1], b.new)
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
	Requests                              int64
	ota.Counts

	whole float64 // seconds from start to exit
}

// state makes an empty directory for a boot record.
func (b *bench) state() (string, error) {
	state := filepath.Join(b.dir, "state")
	if err := os.RemoveAll(state); err != nil {
		return "", err
	}
	return state, os.Mkdir(state, 0o700)
}

// args are the arguments to install a bundle, and more.
func (b *bench) args(from string, more ...string) []string {
	a := []string{"-bundle", from, "-key", b.key, "-slot", b.slots[1], "-state", filepath.Join(b.dir, "state")}
	if b.profile != "" {
		a = append(a, "-profile", b.profile)
	}
	return append(a, more...)
}

// again installs a bundle with the boot record that there is.
func (b *bench) again(from string, more ...string) (r installed, err error) {
	var out bytes.Buffer
	r.whole, err = timed(func() error { return run(&out, b.install, b.args(from, more...)...) })
	if err == nil {
		err = json.Unmarshal(out.Bytes(), &r)
	}
	if err == nil {
		err = b.check()
	}
	return r, err
}

// fresh installs a bundle into a slot that holds an image, of which the boot record
// knows nothing.
func (b *bench) fresh(image, from string, more ...string) (r installed, err error) {
	if err := b.fill(1, image); err != nil {
		return r, err
	}
	if _, err := b.state(); err != nil {
		return r, err
	}
	return b.again(from, more...)
}

// series are the values of one thing that was measured repeatedly.
type series []float64

func (s series) median() float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	return slices.Sorted(slices.Values(s))[len(s)/2]
}

func (s series) String() string {
	return fmt.Sprintf("%.3f to %.3f", slices.Min(s), slices.Max(s))
}
