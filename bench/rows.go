//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
)

// rival is something that does similar work, to be timed.
type rival struct {
	name      string
	want      float64 // ratio to be reached
	run       func() error
	took, cpu series // seconds
}

// beside alternates the install of a bundle with rivals. The slot holds something
// else each time.
func (b *bench) beside(from string, rivals []*rival) (ours []installed, err error) {
	for range b.rounds {
		r, err := b.fresh(b.junk, from)
		if err != nil {
			return nil, err
		}
		ours = append(ours, r)
		for _, v := range rivals {
			if err := b.fill(1, b.junk); err != nil {
				return nil, err
			}
			before := cpu()
			took, err := timed(v.run)
			v.took, v.cpu = append(v.took, took), append(v.cpu, cpu()-before)
			if err == nil {
				err = b.check()
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", v.name, err)
			}
		}
	}
	return ours, nil
}

// cpu returns the seconds of processor time that programs have taken that ended.
// What the kernel does for a loop device is in nobody's account.
func cpu() float64 {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_CHILDREN, &u) // cannot fail
	return (time.Duration(u.Utime.Nano()) + time.Duration(u.Stime.Nano())).Seconds()
}

// field picks a figure of each.
func field(rs []installed, pick func(*installed) float64) (s series) {
	for i := range rs {
		s = append(s, pick(&rs[i]))
	}
	return s
}

func whole(r *installed) float64 { return r.whole }
func burnt(r *installed) float64 { return r.User + r.Sys }

// compared makes rows of what beside measured.
func (b *bench) compared(what string, ours []installed, rivals []*rival) (rs []row) {
	t := field(ours, whole)
	for i, v := range rivals {
		r := row{what: what, ours: t.median(), unit: "s", than: v.name, bound: v.took.median(), want: v.want,
			comments: []string{fmt.Sprintf("theirs %s, CPU %.2f s", v.took, v.cpu.median())}}
		if i == 0 {
			r.comments = append(r.comments, fmt.Sprintf("ours   %s, CPU %.2f s", t, field(ours, burnt).median()))
		}
		rs = append(rs, r)
		what = "  the same"
	}
	return rs
}

// shell is a rival that is a line of shell, in which $IMAGE is the new image and
// $SLOT the target.
func (b *bench) shell(name string, want float64, line string) *rival {
	return &rival{name: name, want: want, run: func() error {
		cmd := exec.Command("sh", "-c", "set -e; "+line)
		cmd.Env = append(os.Environ(), "IMAGE="+b.new, "SLOT="+b.slots[1])
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}}
}

// local installs a bundle from a file beside bounds and beside the other updaters
// that take packages of this kind.
func (b *bench) local(what, from, kind string, bounds ...*rival) ([]row, error) {
	peers, err := b.peers(kind)
	if err != nil {
		return nil, err
	}
	rivals := append(bounds, peers...)
	ours, err := b.beside(from, rivals)
	if err != nil {
		return nil, err
	}
	return b.compared(fmt.Sprintf("local signed bundle, %s, %d MiB", what, b.size>>20), ours, rivals), nil
}

// stored: a signed bundle in a file, stored, every byte read back, beside dd and
// openssl, which check no signature, and beside others that do.
func stored(b *bench) ([]row, error) {
	from, err := b.stored()
	if err != nil {
		return nil, err
	}
	return b.local("stored", from, "none",
		// What dd has left in the page cache is not what the medium holds.
		b.shell("dd conv=fsync; openssl sha256", 0.5, `dd if=$IMAGE of=$SLOT bs=1M conv=fsync,notrunc status=none
			echo 1 2>/dev/null >/proc/sys/vm/drop_caches || true; openssl dgst -sha256 $SLOT`),
		b.shell("dd conv=fsync, nothing read back", 0, `dd if=$IMAGE of=$SLOT bs=1M conv=fsync,notrunc status=none`))
}

// zstd: the same, compressed.
func zstd(b *bench) ([]row, error) {
	from, err := b.zstd()
	if err != nil {
		return nil, err
	}
	if err := run(nil, "zstd", "-q", "-f", "-3", b.new, "-o", b.new+".zst"); err != nil {
		return nil, err
	}
	return b.local("zstd", from, "zstd",
		b.shell("zstd -d | dd conv=fsync, checks nothing", 0.8, `zstd -q -dc $IMAGE.zst | dd of=$SLOT bs=1M iflag=fullblock conv=fsync,notrunc status=none`))
}

// overHTTP: from ota serve, on loopback.
func overHTTP(b *bench) (rs []row, err error) {
	s, err := b.serve()
	if err != nil {
		return nil, err
	}
	defer s.stop()
	for _, kind := range []struct {
		name string
		get  func() (string, error)
	}{{"stored", b.stored}, {"zstd", b.zstd}} {
		from, err := kind.get()
		if err != nil {
			return nil, err
		}
		var local, remote []installed
		for i := range b.rounds + 1 {
			r, err := b.fresh(b.junk, from)
			if err != nil {
				return nil, err
			}
			h, err := b.fresh(b.junk, s.url(from))
			if err != nil {
				return nil, err
			}
			if i > 0 { // the first time the server hashes the file
				local, remote = append(local, r), append(remote, h)
			}
		}
		l, h := field(local, whole), field(remote, whole)
		rs = append(rs, row{what: "over HTTP on loopback, " + kind.name, ours: h.median(), unit: "s", than: "local", bound: l.median(), want: 1.15,
			comments: []string{fmt.Sprintf("HTTP %s, local %s", h, l)}})
	}
	return rs, nil
}

// memory: the most that the program has had in memory.
func memory(b *bench) (rs []row, err error) {
	st, err := b.stored()
	if err != nil {
		return nil, err
	}
	z, err := b.zstd()
	if err != nil {
		return nil, err
	}
	for _, m := range []struct {
		what, from string
		bound      float64
		more       []string
	}{
		{"peak RSS, stored", st, 14, nil},
		{"peak RSS, zstd at the defaults", z, 32, nil},
		{"peak RSS, stored, small", st, 10, []string{"-buffer", "32768"}},
		{"peak RSS, zstd, small", z, 10, []string{"-buffer", "32768", "-workers", "1"}},
	} {
		var all []installed
		for range b.rounds {
			r, err := b.fresh(b.junk, m.from, m.more...)
			if err != nil {
				return nil, err
			}
			all = append(all, r)
		}
		rss := field(all, func(r *installed) float64 { return r.RSS })
		heap := field(all, func(r *installed) float64 { return r.Heap })
		rs = append(rs, row{what: m.what, ours: rss.median(), unit: "MiB", than: "figure to keep", bound: m.bound, want: 1,
			comments: []string{fmt.Sprintf("%s; heap %.1f MiB, %.2f s", rss, heap.median(), field(all, whole).median())}})
	}
	return rs, nil
}

// differing returns how many bytes lie in pieces of size bytes that differ.
func differing(a, b string, size int) (n int64, err error) {
	x, err := os.ReadFile(a)
	if err != nil {
		return 0, err
	}
	y, err := os.ReadFile(b)
	if err != nil {
		return 0, err
	}
	for i := 0; i < len(x); i += size {
		end := min(i+size, len(x))
		if !bytes.Equal(x[i:end], y[i:end]) {
			n += int64(end - i)
		}
	}
	return n, nil
}

const mib = 1 << 20

// online returns a server that has hashed the compressed bundle, the bundle's URL
// there, and its MiB.
func (b *bench) online() (s *server, url string, size float64, err error) {
	from, err := b.zstd()
	if err != nil {
		return nil, "", 0, err
	}
	st, err := os.Stat(from)
	if err != nil {
		return nil, "", 0, err
	}
	if s, err = b.serve(); err != nil {
		return nil, "", 0, err
	}
	url = s.url(from)
	if _, err = b.fresh(b.junk, url); err != nil {
		s.stop()
		return nil, "", 0, err
	}
	return s, url, float64(st.Size()) / mib, nil
}

// smallChange: both slots hold the old image, as the boot record knows, and the new
// one is on a static server.
func smallChange(b *bench) (rs []row, err error) {
	s, from, size, err := b.online()
	if err != nil {
		return nil, err
	}
	defer s.stop()
	old, err := b.bundle("old", b.old, bundle.Packing{})
	if err != nil {
		return nil, err
	}
	if err := b.fill(0, b.old); err != nil {
		return nil, err
	}
	change := func() (installed, error) {
		if err := b.fill(1, b.old); err != nil {
			return installed{}, err
		}
		if _, err := b.state(); err != nil {
			return installed{}, err
		}
		if err := run(nil, b.install, b.args(old, "-running", b.slots[0])...); err != nil {
			return installed{}, err
		}
		if err := dropCaches(); err != nil {
			return installed{}, err
		}
		return b.again(from, "-running", b.slots[0])
	}
	casync, err := b.casync(s)
	if err != nil {
		return nil, err
	}
	var ours []installed
	var theirs, theirCPU series
	var theirBytes int64
	for i := range b.rounds {
		r, err := change()
		if err != nil {
			return nil, err
		}
		ours = append(ours, r)
		if casync == nil || i >= 3 { // it takes long
			continue
		}
		if err := b.fill(1, b.old); err != nil {
			return nil, err
		}
		s.asked()
		before := cpu()
		took, err := timed(casync)
		theirCPU = append(theirCPU, cpu()-before)
		if err == nil {
			err = b.check()
		}
		if err != nil {
			return nil, fmt.Errorf("casync: %w", err)
		}
		theirs, theirBytes = append(theirs, took), s.asked()
	}
	chunk := b.pack.Chunk
	if chunk <= 0 {
		chunk = bundle.MinDefaultChunk
	}
	changed, err := differing(b.old, b.new, int(chunk))
	if err != nil {
		return nil, err
	}
	last := ours[len(ours)-1]
	t := field(ours, whole)
	down := row{what: "small change: downloaded", ours: float64(last.Downloaded) / mib, unit: "MiB", than: "casync, chunks of 64 KiB: not installed",
		comments: []string{fmt.Sprintf("in %d requests, of %.1f MiB; %.1f MiB copied from the other slot", last.Requests, size, float64(last.Copied)/mib)}}
	took := row{what: "small change: time", ours: t.median(), unit: "s", than: "casync: not installed", comments: []string{fmt.Sprintf("ours   %s, CPU %.2f s", t, field(ours, burnt).median())}}
	if casync != nil {
		down.than, down.bound, down.want = "casync, chunks of 64 KiB", float64(theirBytes)/mib, 1.3
		took.than, took.bound, took.want = "casync", theirs.median(), 0.1
		took.comments = append(took.comments, fmt.Sprintf("theirs %s, CPU %.2f s", theirs, theirCPU.median()))
	}
	return []row{down, took,
		{what: "small change: written", ours: float64(last.Written) / mib, unit: "MiB", than: "chunks that differ from the slot", bound: float64(changed) / mib, want: 1.1},
	}, nil
}

// casync returns a rival that extracts the new image with the running slot as its
// seed, nil if it is not installed.
func (b *bench) casync(s *server) (func() error, error) {
	if _, err := exec.LookPath("casync"); err != nil {
		return nil, nil
	}
	store := filepath.Join(b.dir, "casync.castr")
	index := filepath.Join(b.dir, "casync.caibx")
	if err := run(io.Discard, "casync", "make", "--store="+store, "--chunk-size=65536", "--digest=sha256", index, b.new); err != nil {
		return nil, err
	}
	return func() error {
		return run(io.Discard, "casync", "extract", "--seed="+b.slots[0], "--store="+s.url(store), s.url(index), b.slots[1])
	}, nil
}

// same: the image that is installed already.
func same(b *bench) ([]row, error) {
	s, from, file, err := b.online()
	if err != nil {
		return nil, err
	}
	defer s.stop()
	var known, unknown, first series
	var kept, lost installed
	for range b.rounds {
		r, err := b.fresh(b.junk, from)
		if err != nil {
			return nil, err
		}
		first = append(first, r.whole)
		if kept, err = b.again(from); err != nil {
			return nil, err
		}
		known = append(known, kept.whole)
		// Without a boot record that knows of it, it is compared.
		if lost, err = b.fresh(b.new, from); err != nil {
			return nil, err
		}
		unknown = append(unknown, lost.whole)
	}
	image := float64(b.size) / mib
	return []row{
		{what: "same image again: time", ours: known.median(), unit: "s", than: "the first time", bound: first.median()},
		{what: "  written", ours: float64(kept.Written) / mib, unit: "MiB", than: "the image", bound: image, want: 1e-9},
		{what: "  downloaded", ours: float64(kept.Downloaded) / mib, unit: "MiB", than: "the bundle", bound: file, want: 0.01},
		{what: "  downloaded", ours: float64(kept.Downloaded) / mib, unit: "MiB", than: "the image", bound: image, want: 0.01},
		{what: "same image, boot record lost: time", ours: unknown.median(), unit: "s", than: "the first time", bound: first.median()},
		{what: "  written", ours: float64(lost.Written) / mib, unit: "MiB", than: "the image", bound: image, want: 1e-9},
		{what: "  downloaded", ours: float64(lost.Downloaded) / mib, unit: "MiB", than: "the bundle", bound: file, want: 0.01},
	}, nil
}

// resume: killed at a random moment, again and again, until an install gets through.
func resume(b *bench) (rs []row, err error) {
	s, err := b.serve()
	if err != nil {
		return nil, err
	}
	defer s.stop()
	for _, kind := range []struct {
		name string
		get  func() (string, error)
		http bool
	}{{"stored, local", b.stored, false}, {"zstd, HTTP", b.zstd, true}} {
		from, err := kind.get()
		if err != nil {
			return nil, err
		}
		if kind.http {
			from = s.url(from)
		}
		var clean installed
		for range 2 { // the first time the server hashes the file
			if clean, err = b.fresh(b.junk, from); err != nil {
				return nil, err
			}
		}
		if err := b.fill(1, b.junk); err != nil {
			return nil, err
		}
		before, err := writtenTo(b.slots[1])
		if err != nil {
			return []row{{what: "resume", than: "no loop device to count at: " + err.Error()}}, nil
		}
		if _, err := b.state(); err != nil {
			return nil, err
		}
		const kills = 20
		for range kills {
			cmd := exec.Command(b.install, b.args(from)...)
			if err := cmd.Start(); err != nil {
				return nil, err
			}
			time.Sleep(time.Duration(mrand.Float64() * clean.whole * 0.9 * float64(time.Second)))
			cmd.Process.Signal(syscall.SIGKILL)
			cmd.Wait()
		}
		last, err := b.again(from)
		if err != nil {
			return nil, err
		}
		after, err := writtenTo(b.slots[1])
		if err != nil {
			return nil, err
		}
		rs = append(rs, row{what: fmt.Sprintf("killed %d times, %s: written at the device", kills, kind.name), ours: float64(after-before) / mib, unit: "MiB",
			than: "one clean run", bound: float64(clean.Written) / mib, want: 1.05,
			comments: []string{fmt.Sprintf("the last run wrote %.1f MiB", float64(last.Written)/mib)}})
	}
	return rs, nil
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
