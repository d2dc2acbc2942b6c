// Sounds and their results, kept in this browser alone over a reload. Without IndexedDB nothing is kept.

const LIMIT = 200e6; // bytes; the oldest sounds make room
const STORE = "sounds";

let database = null;
let opened = Promise.resolve();
let kept = []; // {key, size, added}, the oldest first

const finish = (request) =>
  new Promise((resolve, reject) => {
    request.addEventListener("success", () => resolve(request.result));
    request.addEventListener("error", () => reject(request.error));
    request.addEventListener("blocked", () => reject(new Error("blocked")));
  });

const run = (mode, operation) => finish(operation(database.transaction(STORE, mode).objectStore(STORE)));

// all that is kept, the oldest first: {key, name, file, size, added, network, results, frames}
export function loadKept() {
  return (opened = open());
}

async function open() {
  try {
    const request = indexedDB.open("soundnet-port", 1);
    request.addEventListener("upgradeneeded", () => request.result.createObjectStore(STORE, { keyPath: "key" }));
    database = await finish(request);
    const records = (await run("readonly", (store) => store.getAll())).sort((a, b) => a.added - b.added);
    kept = records.map(({ key, size, added }) => ({ key, size, added }));
    return records;
  } catch {
    database = null;
    return [];
  }
}

// `record` replaces what is kept of its key; returns whether it is kept now
export async function keep(record) {
  await opened;
  if (!database || record.size > LIMIT) return false;
  const others = kept.filter(({ key }) => key !== record.key);
  let total = record.size + others.reduce((sum, { size }) => sum + size, 0);
  kept = [...others, { key: record.key, size: record.size, added: record.added }].sort((a, b) => a.added - b.added);
  try {
    while (total > LIMIT) {
      const oldest = kept.find(({ key }) => key !== record.key);
      total -= oldest.size;
      await forget(oldest.key);
    }
    await run("readwrite", (store) => store.put(record));
    return true;
  } catch {
    return false; // the browser's own limit, or the user's wish
  }
}

export async function forget(key) {
  kept = kept.filter((record) => record.key !== key);
  if (database) await run("readwrite", (store) => store.delete(key)).catch(() => {});
}

export async function forgetAll() {
  kept = [];
  if (database) await run("readwrite", (store) => store.clear()).catch(() => {});
}
