// Sounds and their results, kept in this browser alone over a reload. Without IndexedDB nothing is kept.

const LIMIT = 200e6; // bytes; the oldest sounds make room
const STORE = "sounds";

let database = null;
let opened = Promise.resolve();
let written = Promise.resolve(); // by the last keep()
let kept = []; // {key, size, added}, the oldest first

// what is done with the store is done or undone together; a full disk may be noticed only at the end
async function run(mode, operation) {
  const transaction = database.transaction(STORE, mode);
  const finished = new Promise((resolve, reject) => {
    transaction.addEventListener("complete", resolve);
    transaction.addEventListener("abort", () => reject(transaction.error || new Error("aborted")));
  });
  let request;
  try {
    request = operation(transaction.objectStore(STORE));
  } catch {
    transaction.abort();
  }
  await finished;
  return request.result;
}

// all that is kept, the oldest first: {key, name, file, size, added, network, results, frames}; null if nothing can be
export function loadKept() {
  return (opened = open());
}

async function open() {
  try {
    const request = indexedDB.open("soundnet-port", 1);
    request.addEventListener("upgradeneeded", () => request.result.createObjectStore(STORE, { keyPath: "key" }));
    database = await new Promise((resolve, reject) => {
      request.addEventListener("success", () => resolve(request.result));
      request.addEventListener("error", () => reject(request.error));
      request.addEventListener("blocked", () => reject(new Error("blocked")));
    });
    const records = (await run("readonly", (store) => store.getAll())).sort((a, b) => a.added - b.added);
    kept = records.map(({ key, size, added }) => ({ key, size, added }));
    return records;
  } catch {
    database = null;
    return null;
  }
}

export const isKept = (key) => kept.some((record) => record.key === key);

// `record` replaces what is kept of its key, one record after the other; returns whether its sound is kept now
export function keep(record) {
  return (written = written.then(() => write(record)));
}

async function write(record) {
  await opened;
  if (!database || record.size > LIMIT) return false;
  const others = kept.filter(({ key }) => key !== record.key);
  let total = record.size + others.reduce((sum, { size }) => sum + size, 0);
  const removed = [];
  for (const { key, size } of others) {
    if (total <= LIMIT) break;
    total -= size;
    removed.push(key);
  }
  try {
    await run("readwrite", (store) => {
      for (const key of removed) store.delete(key);
      return store.put(record);
    });
    const { key, size, added } = record;
    kept = kept.filter((other) => other.key !== key && !removed.includes(other.key));
    kept = [...kept, { key, size, added }].sort((a, b) => a.added - b.added);
  } catch {
    // the browser's own limit, or the user's wish; nothing has changed
  }
  return isKept(record.key);
}

export async function forget(key) {
  kept = kept.filter((record) => record.key !== key);
  if (database) await run("readwrite", (store) => store.delete(key)).catch(() => {});
}

export async function forgetAll() {
  kept = [];
  if (database) await run("readwrite", (store) => store.clear()).catch(() => {});
}
