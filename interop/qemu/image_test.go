package qemu_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"debug/elf"
	"encoding/pem"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/bundle"
)

const (
	sectorSize = 512
	mib        = 1 << 20
)

// kernel is an unpacked kernel package.
type kernel struct {
	image   string            // path
	arch    string            // as in GOARCH
	modules map[string]string // paths, by name
}

// unpacked returns the directory of what setup has unpacked under that name.
func unpacked(t *testing.T, name string) (dir string) {
	t.Helper()
	dir = os.Getenv("OTA_QEMU")
	if dir == "" {
		cache, err := os.UserCacheDir()
		require.NoError(t, err)
		dir = filepath.Join(cache, "ota-qemu")
	}
	dir = filepath.Join(dir, name)
	if _, err := os.Stat(filepath.Join(dir, "complete")); err != nil {
		missing(t, dir, "run interop/qemu/setup full")
	}
	return dir
}

// findKernel returns the kernel that setup has unpacked under that name.
func findKernel(t *testing.T, name string) *kernel {
	t.Helper()
	dir := unpacked(t, name)
	k := &kernel{modules: map[string]string{}}
	k.arch, _, _ = strings.Cut(name, "-")
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	require.NoError(t, err)
	require.Len(t, images, 1)
	k.image = images[0]
	require.NoError(t, filepath.WalkDir(filepath.Join(dir, "lib", "modules"), func(path string, d fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(path), ".ko"); ok {
			k.modules[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	}))
	return k
}

// load returns the paths of the named modules and of what they depend on, in the
// order to load them. What is not a module must be part of the kernel.
func (k *kernel) load(t *testing.T, names ...string) (paths []string) {
	t.Helper()
	for _, name := range names {
		path, ok := k.modules[strings.ReplaceAll(name, "-", "_")]
		if !ok || slices.Contains(paths, path) {
			continue
		}
		f, err := elf.Open(path)
		require.NoError(t, err)
		info, err := f.Section(".modinfo").Data()
		f.Close()
		require.NoError(t, err)
		for entry := range strings.SplitSeq(string(info), "\x00") {
			if deps, ok := strings.CutPrefix(entry, "depends="); ok && deps != "" {
				for _, p := range k.load(t, strings.Split(deps, ",")...) {
					if !slices.Contains(paths, p) {
						paths = append(paths, p)
					}
				}
			}
		}
		paths = append(paths, path)
	}
	return paths
}

// factory makes the images of one test.
type factory struct {
	t       *testing.T
	dir     string
	k       *kernel
	modules []string
	init    string // path of the guest's program
	key     *ecdsa.PrivateKey
	server  *httptest.Server // serves bundles
	// parts makes the parts of a slot.
	parts func(kernel, initramfs []byte) map[string][]byte
}

func newFactory(t *testing.T, k *kernel, modules ...string) *factory {
	t.Helper()
	f := &factory{t: t, dir: t.TempDir(), k: k}
	f.modules = k.load(t, slices.Concat([]string{"virtio_pci", "virtio_blk", "virtio_net"}, modules, []string{"softdog"})...)
	f.init = f.path("init")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", f.init, "./guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+k.arch)
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)
	f.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	f.server = httptest.NewServer(http.FileServer(http.Dir(f.dir)))
	t.Cleanup(f.server.Close)
	return f
}

func (f *factory) path(name string) string { return filepath.Join(f.dir, name) }

// url is where the guest finds a file of the factory: QEMU's user network shows it
// the host as 10.0.2.2.
func (f *factory) url(name string) string {
	return strings.Replace(f.server.URL, "127.0.0.1", "10.0.2.2", 1) + "/" + name
}

func (f *factory) read(name string) []byte {
	f.t.Helper()
	b, err := os.ReadFile(name)
	require.NoError(f.t, err)
	return b
}

// initramfs returns an archive with the guest. fault is what goes wrong in it.
func (f *factory) initramfs(version, fault string) []byte {
	f.t.Helper()
	der, err := x509.MarshalPKIXPublicKey(&f.key.PublicKey)
	require.NoError(f.t, err)
	var a cpio
	for _, dir := range []string{"dev", "proc", "sys", "run", "modules"} {
		a.add(dir, 0o040755, nil)
	}
	a.device("dev/console", 0o020600, 5, 1)
	a.add("init", 0o100755, f.read(f.init))
	a.add("version", 0o100644, []byte(version))
	a.add("fault", 0o100644, []byte(fault))
	a.add("parts", 0o100644, []byte(strings.Join(slices.Sorted(maps.Keys(f.parts(nil, nil))), " ")))
	a.add("key.pem", 0o100644, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	var list []string
	for _, m := range f.modules {
		list = append(list, filepath.Base(m))
		a.add("modules/"+filepath.Base(m), 0o100644, f.read(m))
	}
	a.add("modules/list", 0o100644, []byte(strings.Join(list, "\n")))
	return a.end()
}

// cpio is an archive of the "newc" format (torvalds/linux,
// Documentation/driver-api/early-userspace/buffer-format.rst).
type cpio struct {
	b bytes.Buffer
	n int
}

func (a *cpio) add(name string, mode int, data []byte) { a.entry(name, mode, 0, 0, data) }

func (a *cpio) device(name string, mode, major, minor int) { a.entry(name, mode, major, minor, nil) }

func (a *cpio) entry(name string, mode, major, minor int, data []byte) {
	a.n++
	fmt.Fprintf(&a.b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.n, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0, name)
	a.pad()
	a.b.Write(data)
	a.pad()
}

func (a *cpio) pad() { a.b.Write(make([]byte, -a.b.Len()&3)) }

func (a *cpio) end() []byte {
	a.entry("TRAILER!!!", 0, 0, 0, nil)
	return a.b.Bytes()
}

// file is a file of a file system.
type file struct {
	path string // such as "/dir/name"
	data []byte
}

// epoch is the time of all files, so that the same files make the same image.
var epoch = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)

// fat makes a FAT file system of some size that holds the files, with Debian's
// mtools, and returns its content.
func (f *factory) fat(files ...file) []byte {
	f.t.Helper()
	size := mib
	for _, x := range files {
		size += len(x.data) + len(x.data)/64
	}
	img, temp := f.path("fat.img"), f.path("fat.file")
	defer os.Remove(img)
	run(f.t, "mformat", "-C", "-i", img, "-T", fmt.Sprint(size/sectorSize&^511), "-h", "16", "-s", "32", "-c", "8", "-N", "1", "::")
	made := map[string]bool{"/": true}
	for _, x := range files {
		var up []string
		for dir := path.Dir(x.path); !made[dir]; dir = path.Dir(dir) {
			up = append(up, "::"+dir)
			made[dir] = true
		}
		slices.Reverse(up)
		if len(up) > 0 {
			run(f.t, "mmd", append([]string{"-i", img}, up...)...)
		}
		require.NoError(f.t, os.WriteFile(temp, x.data, 0o600))
		require.NoError(f.t, os.Chtimes(temp, epoch, epoch))
		run(f.t, "mcopy", "-m", "-i", img, temp, "::"+x.path)
	}
	return f.read(img)
}

// image is the content of a slot.
type image struct {
	version string
	parts   map[string][]byte // by name
}

// image makes an image with the guest. fault is what goes wrong in it; kernel is nil
// for the one that works.
func (f *factory) image(version, fault string, kernel []byte) *image {
	f.t.Helper()
	if kernel == nil {
		kernel = f.read(f.k.image)
	}
	return &image{version, f.parts(kernel, f.initramfs(version, fault))}
}

// bundle makes a signed bundle and returns where the guest finds it.
func (f *factory) bundle(img *image) (url string) {
	f.t.Helper()
	m := &bundle.Manifest{Name: "guest", Platform: "qemu", Version: img.version}
	files := map[string]bundle.File{}
	for _, name := range slices.Sorted(maps.Keys(img.parts)) {
		m.Parts = append(m.Parts, bundle.Part{Name: name, Src: name + ".img"})
		files[name+".img"] = bytes.NewReader(img.parts[name])
	}
	w, err := os.Create(f.path(img.version + ".zip"))
	require.NoError(f.t, err)
	require.NoError(f.t, bundle.Write(f.t.Context(), w, m, files, &bundle.WriteOptions{Keys: []crypto.Signer{f.key}}))
	require.NoError(f.t, w.Close())
	return f.url(img.version + ".zip")
}

// part is a partition.
type part struct {
	name string
	size int64  // bytes
	kind string // type code of sgdisk; "" means Linux
	data []byte
	off  int64 // bytes; set by disk
}

// disk writes a disk with a GPT and these partitions, from 1 MiB on.
func (f *factory) disk(name string, parts []part) (img string) {
	f.t.Helper()
	img = f.path(name)
	d, err := os.Create(img)
	require.NoError(f.t, err)
	defer d.Close()
	off := int64(mib)
	args := []string{"-a", "8"}
	for i := range parts {
		p := &parts[i]
		require.LessOrEqual(f.t, int64(len(p.data)), p.size, p.name)
		p.off = off
		off += p.size
		n := fmt.Sprint(i + 1)
		args = append(args, "-n", fmt.Sprintf("%s:%d:%d", n, p.off/sectorSize, off/sectorSize-1), "-c", n+":"+p.name)
		if p.kind != "" {
			args = append(args, "-t", n+":"+p.kind)
		}
		_, err := d.WriteAt(p.data, p.off)
		require.NoError(f.t, err)
	}
	require.NoError(f.t, d.Truncate(off+mib))
	run(f.t, "sgdisk", append(args, img)...)
	return img
}
