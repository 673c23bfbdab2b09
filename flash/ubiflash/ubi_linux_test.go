package ubiflash

import (
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

// The structures have the sizes that are part of the ioctls' meaning.
func TestStructures(t *testing.T) {
	require.EqualValues(t, 16, unsafe.Sizeof(changeReq{}))
	require.EqualValues(t, 16+32*136, unsafe.Sizeof(renameReq{}))
	require.EqualValues(t, 8, unsafe.Offsetof(renameReq{}.ents[0].str))
}

func TestSysfs(t *testing.T) {
	root := t.TempDir()
	for name, content := range map[string]string{
		"ubi0_0/name": "rootfs-a\n", "ubi0_1/name": "rootfs-b\n", "ubi0_12/name": "data\n", "ubi1_0/name": "other\n",
		"ubi0_1/reserved_ebs": "17\n", "ubi0_1/usable_eb_size": "126976\n", "ubi0_1/upd_marker": "1\n", "ubi0_1/corrupted": "0\n", "ubi0_1/type": "static\n",
	} {
		path := filepath.Join(root, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
	}
	for in, want := range map[string]string{"ubi0:data": "/dev/ubi0_12", "/dev/ubi0:rootfs-a": "/dev/ubi0_0", "/dev/ubi0_5": "/dev/ubi0_5"} {
		got, err := find(root, in)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	_, err := find(root, "ubi0:other")
	require.ErrorIs(t, err, os.ErrNotExist)

	d := &device{dir: filepath.Join(root, "ubi0_1")}
	i, err := d.info()
	require.NoError(t, err)
	require.Equal(t, Info{Name: "rootfs-b", Size: 17 * 126976, LEBSize: 126976, Static: true, Interrupted: true}, i)
	_, err = (&device{dir: filepath.Join(root, "ubi0_0")}).info()
	require.ErrorIs(t, err, os.ErrNotExist)

	vols, err := volumes(root, "ubi0")
	require.NoError(t, err)
	require.Equal(t, map[string]int32{"rootfs-a": 0, "rootfs-b": 1, "data": 12}, vols)
	req, err := renaming(vols, []Pair{{"rootfs-a", "rootfs-b"}})
	require.NoError(t, err)
	require.EqualValues(t, 2, req.count)
	require.EqualValues(t, 0, req.ents[0].id)
	require.Equal(t, "rootfs-b\x00", string(req.ents[0].str[:9]))
	require.EqualValues(t, 8, req.ents[1].len)
	require.EqualValues(t, 1, req.ents[1].id)
	require.Equal(t, "rootfs-a\x00", string(req.ents[1].str[:9]))
	_, err = renaming(vols, []Pair{{"rootfs-a", "none"}})
	require.ErrorIs(t, err, os.ErrNotExist)

	for _, pairs := range [][]Pair{{}, {{"a", "a"}}, {{"a", "b"}, {"b", "c"}}, {{"", "b"}}, make([]Pair, 17)} {
		require.ErrorIs(t, Swap("/dev/ubi0", pairs...), ota.ErrInvalid)
	}
}
